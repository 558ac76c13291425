"""Errors as the OpenAI API words them: `{"error": {"message", "type", "param", "code"}}`, on every route."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from vivace.errors import InputError
from vivace.serve.failures import Busy, Failure, FieldError, UnknownModelError

logger = logging.getLogger(__name__)

STATUS = {
    "queue_full": 429,
    "cancelled": 499,
    "deadline_exceeded": 504,
    "out_of_memory": 507,
    "unavailable": 503,
    "failed": 500,
}
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

MOST_NAME = 200  # characters of a field's name that are repeated; a client may have made it up

# A request's field in Python -> the field in the API.
FIELDS = {"guidance": "guidance_scale", "true_cfg": "true_cfg_scale", "negative": "negative_prompt", "images": "image"}

# What a value fails at, by pydantic's name, or its field -> what is told of it.
_WHOLE = "{param} is {got}; it has to be a whole number"
_NUMBER = "{param} is {got}; it has to be a number"
WORDS = {
    "string_too_short": "the {param} is empty; say what to draw",  # of a prompt alone
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_type": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": _NUMBER,
    "bool_parsing": "{param} is {got}; it has to be true or false",
    "bool_type": "{param} is {got}; it has to be true or false",
    "string_type": "{param} is {got}; it has to be text",
    "dict_type": "{param} is {got}; it has to be an object",
    "literal_error": "{param} is {got}; it has to be {expected}",
    "greater_than_equal": "{param} is {got}, the least is {ge}",
    "less_than_equal": "{param} is {got}, the most is {le}",
    "less_than": "{param} is {got}; it has to be less than {lt}",
    "size": "size is {got}; give WIDTHxHEIGHT in pixels, as in 1024x768",
    "seconds": "seconds is {got}; give whole seconds, as in '4'",
    "override_settings": "a request cannot change the server: leave {param} out, or empty",
    "alwayson_scripts": "a request cannot run scripts: leave {param} out, or empty",
    "styles": "there are no styles here: leave {param} out, or empty",
    "init_images": "{param} has to be a list of one picture, in base64",
}

_TEXT: dict[str, Any] = {"type": "string"}
_TEXT_OR_NULL = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR = {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL}
_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": [*_ERROR], "properties": _ERROR}},
}

DESCRIBED = {"description": "What is wrong", "content": {"application/json": {"schema": _SCHEMA}}}
"""The envelope, as the API's description has it for every route."""


class ApiError(Exception):
    """An answer with this status and envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def api_error(error: BaseException, **facts: object) -> ApiError:
    """The answer for any error. What is not ours to tell becomes a plain 500; the log has the rest, with `facts`."""
    if isinstance(error, ApiError | InputError | Failure):
        # A job and its error would hold each other: by the frames that it came through, which have its pictures too.
        error.__traceback__ = None
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, FieldError):
        return ApiError(400, str(error), code="invalid_value", param=FIELDS.get(error.field, error.field))
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code=error.code, headers={"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, Failure):
        headers = {"Retry-After": "5"} if error.code == "unavailable" else None
        return ApiError(STATUS[error.code], str(error), code=error.code, headers=headers)
    logger.error("unexpected", exc_info=error, extra={"facts": facts})
    return ApiError(500, "an error inside the server; its log says more", code="internal_error")


def in_its_words(effective: Mapping[str, Any]) -> dict[str, Any]:
    """What was used, under the names that a request gives it by."""
    return {FIELDS.get(name, name): value for name, value in effective.items()}


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """What goes wrong inside names its field as the route's clients do."""
    try:
        yield
    except (ApiError, InputError) as error:
        found = api_error(error)
        found.param = names.get(found.param or "", found.param)
        raise found from None


def disk_error(error: OSError) -> ApiError:
    """The answer where something could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ApiError(507, "the disk is full" if full else "the disk cannot be written", code="disk_full")


def wrong_fields(problems: list[Any]) -> ApiError:
    """The answer for values that a schema refuses: the first one, named."""
    first = problems[0]
    param = ".".join(str(part) for part in first["loc"])[:MOST_NAME] or None
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return ApiError(400, str(cause), code="invalid_value", param=cause.field)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", code="unknown_field", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"the field {param!r} is missing", code="missing_field", param=param)
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    words = WORDS.get(param or "") or WORDS.get(first["type"]) or "{param}: {msg}"
    told = {"param": param or "the request", "got": f"{first['input']!r:.60}", "msg": first["msg"]}
    return ApiError(400, words.format(**first.get("ctx", {}) | told), code="invalid_value", param=param)


def install(app: FastAPI) -> None:
    """Let every error that is known come out of `app` in the envelope."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            # FastAPI puts "query" or "path" in front of the name.
            return wrong_fields([{**one, "loc": one["loc"][1:]} for one in error.errors()]).response()
        if isinstance(error, HTTPException):
            words = {404: "no such route", 405: "no such method here"}
            text = words.get(error.status_code, "the request cannot be read")
            return ApiError(error.status_code, text, headers=error.headers).response()
        return api_error(error).response()

    # What else there is, the guard answers.
    for kind in (RequestValidationError, HTTPException, ApiError, InputError, Failure):
        app.add_exception_handler(kind, answer)
