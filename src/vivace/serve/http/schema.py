"""What the routes take: strict, unknown fields refused, limits from the settings."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import FormData, UploadFile

from vivace.config import PRESETS
from vivace.serve.failures import FieldError
from vivace.serve.http.envelope import MOST_NAME, ApiError, wrong_fields
from vivace.serve.http.settings import Settings
from vivace.serve.request import Request

SIZE = r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$"
MOST_LORAS = 8

# Field -> how JSON Schema calls its limit, and the setting that is its limit.
LIMITS = {
    "prompt": ("maxLength", "most_prompt"),
    "negative_prompt": ("maxLength", "most_prompt"),
    "steps": ("maximum", "most_steps"),
    "n": ("maximum", "most_pictures"),
    "batch_size": ("maximum", "most_pictures"),
    "frames": ("maximum", "most_frames"),
}

# OpenAI's words for quality -> presets, best first; the first one that exists is taken.
QUALITIES = {
    "high": ("exact",),
    "hd": ("exact",),
    "medium": ("balanced", "exact"),
    "low": ("fast", "balanced", "exact"),
}
SERVERS_OWN = ("auto", "standard")


def _no_switch(value: Any) -> Any:
    # Python counts True as 1.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "it has to be a number, not true or false")
    return value


PLAIN = BeforeValidator(_no_switch)
"""Behind a type's bounds: in front of them these would not be among what /openapi.json says of it."""

Whole = Annotated[int, PLAIN]
Number = Annotated[float, PLAIN]


class Fields(BaseModel):
    """The fields of a request: no others are taken, and `null` is how clients spell one that is not given."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None or name not in cls.model_fields}


class Order(Fields):
    """What pictures and videos are both asked for with. Fields beyond OpenAI's are top level too."""

    prompt: str = Field(min_length=1, max_length=100_000)
    model: str | None = Field(None, max_length=200)
    size: str | None = Field(None, pattern=SIZE)
    seed: Annotated[int, Field(ge=0, lt=2**63), PLAIN] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000), PLAIN] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100), PLAIN] | None = None
    true_cfg_scale: Annotated[float, Field(ge=0, le=100), PLAIN] | None = None
    negative_prompt: str | None = Field(None, max_length=100_000)
    scheduler: str | None = Field(None, max_length=100)
    cache: str | None = Field(None, max_length=200)
    lora: dict[str, Annotated[float, Field(ge=-100, le=100), PLAIN]] = Field(
        default_factory=dict, max_length=MOST_LORAS
    )
    deterministic: bool = False
    user: str | None = Field(None, max_length=1000)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _short(cls, value: str | None, info: ValidationInfo) -> str | None:
        limit = settings_of(info).most_prompt
        if value is not None and len(value) > limit:
            raise FieldError(info.field_name or "prompt", f"it has {len(value)} characters, the most is {limit}")
        if value is not None and "\x00" in value:
            raise FieldError(info.field_name or "prompt", "it holds a NUL character")
        return value

    @field_validator("steps")
    @classmethod
    def _few(cls, value: int | None, info: ValidationInfo) -> int | None:
        limit = settings_of(info).most_steps
        if value is not None and value > limit:
            raise FieldError("steps", f"steps is {value}, the most is {limit}")
        return value

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height; None: the model's own."""
        if self.size is None or self.size == "auto":
            return None
        width, _, height = self.size.partition("x")
        return int(width), int(height)

    def request(self, **fields: Any) -> Request:
        """The engine's request, with `fields` added."""
        return Request(
            prompt=self.prompt,
            negative=self.negative_prompt,
            size=self.pixels,
            steps=self.steps,
            guidance=self.guidance_scale,
            true_cfg=self.true_cfg_scale,
            seed=self.seed,
            cache=self.cache,
            scheduler=self.scheduler,
            lora=self.lora,
            deterministic=self.deterministic,
            **fields,
        )


class ImageOrder(Order):
    """POST /v1/images/generations."""

    n: Whole = Field(1, ge=1, le=100)
    quality: str = Field("auto", max_length=100)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Whole = Field(90, ge=0, le=100)
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto"] = "auto"
    stream: bool = False
    partial_images: Whole = Field(0, ge=0, le=3)

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> ImageOrder:
        settings = settings_of(info)
        if self.n > settings.most_pictures:
            raise FieldError("n", f"n is {self.n}, the most is {settings.most_pictures}")
        if self.stream and self.n != 1:
            raise FieldError("n", "a stream has one picture; leave n at 1")
        if self.partial_images and not self.stream:
            raise FieldError("partial_images", "partial_images needs stream=true")
        if self.stream and self.response_format != "b64_json":
            raise FieldError("response_format", "a stream carries b64_json; leave response_format at that")
        check_pixels(self.pixels, settings.most_pixels, count=self.n)
        return self

    @property
    def preset(self) -> str | None:
        """The preset that `quality` names; None: the model's own. Raises FieldError."""
        return preset(self.quality)


class EditOrder(ImageOrder):
    """The fields of POST /v1/images/edits, besides its files."""

    strength: Annotated[float, Field(gt=0, le=1), PLAIN] | None = None


class VideoOrder(Order):
    """POST /v1/videos, besides its file."""

    seconds: str | None = Field(None, pattern=r"^[1-9][0-9]{0,2}$")
    frames: Annotated[int, Field(ge=1, le=100_000), PLAIN] | None = None
    fps: Annotated[int, Field(ge=1, le=120), PLAIN] | None = None
    quality: str = Field("auto", max_length=100)

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> VideoOrder:
        settings = settings_of(info)
        if self.frames is not None and self.seconds is not None:
            raise FieldError("seconds", "seconds and frames were both given; give one")
        if self.frames is not None and self.frames > settings.most_frames:
            raise FieldError("frames", f"frames is {self.frames}, the most is {settings.most_frames}")
        check_pixels(self.pixels, settings.most_video_pixels, count=self.frames or 1)
        return self


def preset(quality: str) -> str | None:
    """The preset that a `quality` names; None: the model's own. Raises FieldError."""
    if quality in SERVERS_OWN:
        return None
    for name in QUALITIES.get(quality, (quality,)):
        if name in PRESETS:
            return name
    words = ", ".join(dict.fromkeys((*PRESETS, *QUALITIES, *SERVERS_OWN)))
    raise FieldError("quality", f"no quality {quality!r}; there are {words}")


def check_pixels(size: tuple[int, int] | None, most: int, *, count: int = 1) -> None:
    """Raises FieldError for `count` pictures or frames that are more pixels than one request may want."""
    if size is not None and size[0] * size[1] * count > most:
        times = f", {count} times," if count > 1 else ""
        text = f"{size[0]}x{size[1]} pixels{times} is more than the {most} that one request may want"
        raise FieldError("size", text)


def from_form(kind: type[Any], form: FormData, settings: Settings, *, files: tuple[str, ...]) -> Any:
    """An order from a form's text fields, in which `files` name the fields that hold files. Raises ApiError."""
    fields: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name in kind.model_fields:
                raise ApiError(400, f"{name} is a file; send it as text", code="invalid_value", param=name)
            if name not in files:
                raise ApiError(400, f"unknown field {name!r:.100}", code="unknown_field", param=name[:MOST_NAME])
        elif name in files:
            # Not an address either: nothing is ever fetched.
            raise ApiError(400, f"{name} is text; send the picture itself, as a file", code="invalid_value", param=name)
        elif name in fields:
            raise ApiError(
                400, f"the field {name!r:.100} was given twice", code="invalid_value", param=name[:MOST_NAME]
            )
        elif (inner := re.fullmatch(r"lora\[([^\]]{1,100})\]", name)) is not None:
            # How the openai client spells a mapping in a form.
            weights[inner[1]] = value
        else:
            fields[name] = value
    if weights:
        if "lora" in fields:
            raise ApiError(400, "the field 'lora' was given twice", code="invalid_value", param="lora")
        fields["lora"] = weights
    elif "lora" in fields:
        try:
            fields["lora"] = json.loads(fields["lora"])
        except (ValueError, RecursionError):
            raise ApiError(400, "lora is not a JSON object", code="invalid_value", param="lora") from None
    return read(kind, fields, settings)


def read(kind: type[Any], fields: Any, settings: Settings) -> Any:
    """An order of that kind. Raises ApiError that names the wrong field."""
    try:
        return kind.model_validate(fields, context=settings)
    except ValidationError as error:
        raise wrong_fields(list(error.errors(include_url=False))) from None


def limited(description: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """An API's own description with the limits that these settings set."""
    found = copy.deepcopy(dict(description))
    operations = [one for path in found["paths"].values() for one in path.values() if "requestBody" in one]
    for body in [kind for one in operations for kind in one["requestBody"]["content"].values()]:
        for name, schema in body["schema"]["properties"].items():
            if name in LIMITS:
                keyword, most = LIMITS[name]
                schema.get("anyOf", [schema])[0][keyword] = getattr(settings, most)
    return found


def settings_of(info: ValidationInfo) -> Settings:
    """The limits that a validation was given; the defaults without any."""
    return info.context if isinstance(info.context, Settings) else Settings()
