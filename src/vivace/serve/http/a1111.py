"""A small part of the A1111 API, for desktop clients that speak it: txt2img, img2img, progress, interrupt.

Off unless asked for. Settings are never overridden and scripts never run: whoever sends either gets a 400.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import Field, ValidationInfo, model_validator
from starlette.responses import JSONResponse, Response

from vivace.serve.failures import FieldError
from vivace.serve.http.envelope import ApiError, renamed
from vivace.serve.http.images import first_of, json_body, make
from vivace.serve.http.schema import PLAIN, Fields, ImageOrder, Number, Whole, read, settings_of
from vivace.serve.http.server import Server, read_json, server_of
from vivace.serve.http.uploads import decode
from vivace.serve.job import Progress
from vivace.serve.request import Request as EngineRequest

router = APIRouter(prefix="/sdapi/v1")

# A1111's names of samplers -> schedulers.
SAMPLERS = {
    "Euler": "euler",
    "Euler a": "eulerancestral",
    "DPM++ 2M": "dpmsolvermultistep",
    "DDIM": "ddim",
    "UniPC": "unipc",
    "Heun": "heun",
}

# An ImageOrder's field -> A1111's.
FIELDS = {"guidance_scale": "cfg_scale", "scheduler": "sampler_name", "size": "width", "n": "batch_size"}
FIELDS |= {"image": "init_images", "strength": "denoising_strength", "lora": "prompt"}

LORA = re.compile("<lora:([^<>]*)>")
"""How prompts name LoRAs: <lora:alias:weight>, or <lora:alias>."""


class Txt2Img(Fields):
    """POST /sdapi/v1/txt2img: what it does not list is refused."""

    prompt: str = Field(min_length=1, max_length=100_000)
    negative_prompt: str = Field("", max_length=100_000)
    seed: Whole = Field(-1, ge=-1, lt=2**63)
    steps: Annotated[int, Field(ge=1, le=10_000), PLAIN] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100), PLAIN] | None = None
    width: Annotated[int, Field(ge=1, le=99_999), PLAIN] | None = None
    height: Annotated[int, Field(ge=1, le=99_999), PLAIN] | None = None
    batch_size: Whole = Field(1, ge=1, le=100)
    n_iter: Literal[1] = 1
    sampler_name: str | None = Field(None, max_length=100)
    send_images: Literal[True] = True
    save_images: Literal[False] = False
    override_settings: dict[str, Any] = Field(default_factory=dict, max_length=0)
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict, max_length=0)
    # What clients send as a matter of course: taken where it asks for nothing.
    restore_faces: Literal[False] = False
    tiling: Literal[False] = False
    enable_hr: Literal[False] = False
    styles: list[str] = Field(default_factory=list, max_length=0)
    subseed: Whole = -1
    subseed_strength: Number = Field(0, ge=0, le=0)
    do_not_save_samples: bool = True
    do_not_save_grid: bool = True

    @model_validator(mode="after")
    def _whole(self, info: ValidationInfo) -> Txt2Img:
        if (self.width is None) != (self.height is None):
            raise FieldError("width", "width and height go together; give both or neither")
        if self.sampler_name is not None and self.sampler_name not in SAMPLERS:
            raise FieldError("sampler_name", f"no sampler {self.sampler_name!r}; there are {', '.join(SAMPLERS)}")
        # The limits are those of the OpenAI route.
        with renamed(FIELDS | {f"lora.{alias}": "prompt" for alias in self.loras}):
            read(ImageOrder, self.order(), settings_of(info))
        return self

    @property
    def loras(self) -> dict[str, str | float]:
        """The LoRAs that the prompt names, with their weights as they stand there. Raises FieldError."""
        found: dict[str, str | float] = {}
        for text in LORA.findall(self.prompt):
            alias, *weights = text.split(":")
            if alias in found or len(weights) > 1:
                raise FieldError("prompt", f"<lora:{text:.100}>: a LoRA is named once, with one weight")
            found[alias] = weights[0] if weights else 1.0
        return found

    def order(self) -> dict[str, Any]:
        """The same as the fields of an ImageOrder. Raises FieldError."""
        found = {
            "prompt": LORA.sub("", self.prompt).strip() if self.loras else self.prompt,
            "lora": self.loras or None,
            "negative_prompt": self.negative_prompt or None,
            "seed": None if self.seed < 0 else self.seed,
            "steps": self.steps,
            "guidance_scale": self.cfg_scale,
            "size": f"{self.width}x{self.height}" if self.width else None,
            "n": self.batch_size,
            "scheduler": SAMPLERS[self.sampler_name] if self.sampler_name else None,
        }
        return {name: value for name, value in found.items() if value is not None}


class Img2Img(Txt2Img):
    """POST /sdapi/v1/img2img."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    denoising_strength: Number = Field(0.75, gt=0, le=1)
    resize_mode: Literal[0] = 0
    include_init_images: Literal[False] = False


@router.post("/txt2img", openapi_extra=json_body(Txt2Img))
async def txt2img(request: Request) -> Response:
    """Pictures from a prompt."""
    asked: Txt2Img = read(Txt2Img, await read_json(request), server_of(request).settings)
    order = _order(request, asked)
    with renamed(FIELDS):
        first = first_of(request, order)
    return await _answer(request, order, first, _parameters(asked))


@router.post("/img2img", openapi_extra=json_body(Img2Img))
async def img2img(request: Request) -> Response:
    """Pictures from a prompt and another picture; white in the mask is painted anew."""
    order, first, parameters = await _edit(request)
    return await _answer(request, order, first, parameters)


async def _edit(request: Request) -> tuple[ImageOrder, EngineRequest, dict[str, Any]]:
    """An edit's order, request and parameters. Here, so that nothing holds its pictures as they came while it waits."""
    server = server_of(request)
    asked: Img2Img = read(Img2Img, await read_json(request), server.settings)
    order = _order(request, asked)
    with renamed(FIELDS):
        first = first_of(request, order)
        async with server.decoding:
            image = await asyncio.to_thread(_decode, asked.init_images[0], server, "init_images")
            fields: dict[str, Any] = {"images": (image.convert("RGB"),), "strength": asked.denoising_strength}
            if asked.mask:
                fields["mask"] = (await asyncio.to_thread(_decode, asked.mask, server, "mask")).convert("L")
            return order, await server.fitted(replace(first, **fields)), _parameters(asked)


@router.get("/progress")
async def progress(request: Request) -> Response:
    """How far the pictures are that these routes make now."""
    jobs = [job for job in server_of(request).interruptible if not job.over]
    told = [next((one for one in reversed(job.events) if isinstance(one, Progress)), None) for job in jobs]
    shares = [one.step / max(1, one.total) if one else 0.0 for one in told]
    left = max((one.seconds_left or 0.0 for one in told if one), default=0.0)
    done = sum(shares) / len(shares) if shares else 0.0
    state = {"job_count": len(jobs)}
    return JSONResponse({"progress": done, "eta_relative": left, "state": state, "current_image": None})


@router.post("/interrupt")
async def interrupt(request: Request) -> Response:
    """End the pictures that these routes make now."""
    for job in list(server_of(request).interruptible):
        job.cancel()
    return JSONResponse({})


@router.get("/sd-models")
async def sd_models(request: Request) -> Response:
    """The aliases that make pictures, as A1111 lists checkpoints."""
    models = server_of(request).engine.models.values()
    return JSONResponse([{"title": one.alias, "model_name": one.alias} for one in models if one.media == "image"])


@router.get("/options")
async def options(request: Request) -> Response:
    """The model that draws, which clients ask for before anything else; none of it can be set."""
    return JSONResponse({"sd_model_checkpoint": server_of(request).alias(None, media="image")})


@router.get("/loras")
async def loras(request: Request) -> Response:
    """The LoRAs that prompts may name."""
    server = server_of(request)
    known = server.engine.model(server.alias(None, media="image")).spec.loras
    return JSONResponse([{"name": alias, "alias": alias, "metadata": {}} for alias in known])


@router.get("/samplers")
async def samplers() -> Response:
    """The samplers that requests may name."""
    return JSONResponse([{"name": name, "aliases": [], "options": {}} for name in SAMPLERS])


def _order(request: Request, asked: Txt2Img) -> ImageOrder:
    return read(ImageOrder, asked.order(), server_of(request).settings)


def _parameters(asked: Txt2Img) -> dict[str, Any]:
    return asked.model_dump(exclude={"init_images", "mask"})


async def _answer(request: Request, order: ImageOrder, first: EngineRequest, parameters: dict[str, Any]) -> Response:
    with renamed(FIELDS):
        results, entries = await make(request, order, first, watch=server_of(request).interruptible)
    facts = dict(results[0].effective) | {"all_seeds": [one.effective["seed"] for one in results]}
    return JSONResponse(
        {"images": [entry["b64_json"] for entry in entries], "parameters": parameters, "info": json.dumps(facts)}
    )


def _decode(text: str, server: Server, field: str) -> Image.Image:
    # A browser's clients send a data URL; nothing else that looks like an address is understood.
    _, comma, rest = text.partition(",")
    try:
        raw = base64.b64decode(rest if comma and text.startswith("data:image/") else text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{field}: it is not base64", code="invalid_image", param=field) from None
    return decode(raw, server.settings, field=field)
