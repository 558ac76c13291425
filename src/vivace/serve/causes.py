"""What went wrong inside, as the waiting side gets to see it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vivace.errors import InputError
from vivace.serve.failures import Failure, FieldError, OutOfMemory
from vivace.serve.request import Request
from vivace.serve.worker import out_of_memory

logger = logging.getLogger(__name__)


def named(error: InputError, request: Request) -> InputError:
    """What a model cannot be brought into, as an error of the field that asked for it."""
    asked = [name for name in ("cache", "quality") if getattr(request, name) is not None]
    return FieldError(asked[0], str(error)) if asked and not isinstance(error, FieldError) else error


def public(error: BaseException, facts: Mapping[str, str]) -> BaseException:
    """What the waiting side gets to see: a Failure or an InputError, never the inside."""
    if isinstance(error, Failure):
        return error
    if out_of_memory(error):
        return OutOfMemory("the device has too little memory for it")
    if isinstance(error, InputError):
        return error
    logger.error("a request failed", exc_info=error, extra={"facts": facts})
    if type(error) is ValueError:  # how pipelines refuse what they were called with
        return InputError("the model's pipeline refuses these arguments")
    return Failure("the request failed inside; the log says why")
