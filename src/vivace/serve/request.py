"""What one picture or video is asked for with: `Request`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from PIL import Image

from vivace.generation.job import FIELDS, RESERVED, SEEDS
from vivace.serve.failures import FieldError

# Arguments of a pipeline's call that would scale the LoRA layers which other requests share.
SHARED_STATE = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

# Arguments of a pipeline's call -> the field that says the same; pictures of control models have none.
OTHER = ("image", "mask_image", "control_image", "controlnet_conditioning_scale", "adapter_conditioning_scale")
WORDS = {"prompts": "prompt", "count": "a request for each"}  # where a request has no such field
SAID = {name: WORDS.get(said, said) for name, said in FIELDS.items() if name not in (*OTHER, "ip_adapter_image")}

# What a field holds, in words and as types; each may be None too where that is its default.
TEXT, WHOLE, NUMBER = (str, "text"), (Integral, "a whole number"), (Real, "a number")
KINDS: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("prompt", "model", "negative", "quality", "cache", "scheduler"), TEXT),
    **dict.fromkeys(("steps", "seed", "frames", "fps", "priority", "preview_every", "previews"), WHOLE),
    **dict.fromkeys(("guidance", "true_cfg", "strength", "queue_seconds", "run_seconds"), NUMBER),
    "size": ((tuple, list), "a width and a height"),
    "lora": (Mapping, "aliases with their weights"),
    "images": ((tuple, list), "pictures"),
    "mask": (Image.Image, "a picture"),
    "arguments": (Mapping, "names with their values"),
}

FILES = (".yaml", ".yml", ".json", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture or video. None means what the model was made for."""

    prompt: str = ""
    model: str | None = None  # alias; None: the engine's first
    negative: str | None = None
    size: tuple[int, int] | None = None  # width, height in pixels
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    seed: int | None = None  # drawn and reported when None
    quality: str | None = None  # a preset's name; None: the model's own
    cache: str | None = None  # a step cache's spelling, or "none"; None: the preset's
    scheduler: str | None = None
    lora: Mapping[str, float] = field(default_factory=dict)  # registered alias -> weight
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None  # white is painted anew
    strength: float | None = None
    frames: int | None = None
    fps: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # more of the pipeline's call, such as control_image
    deterministic: bool = False  # never batched: the same bits every time
    warm: bool = False  # a step is drawn and thrown away first, so that the time says what the next picture's will be
    priority: int = 0  # higher goes first
    queue_seconds: float | None = None  # the longest it may wait
    run_seconds: float | None = None  # the longest it may run
    preview_every: int = 0  # steps between small previews; 0: as `previews` says
    previews: int = 0  # so many small previews, spread over the steps that are taken

    def __post_init__(self) -> None:
        self._check_kinds()
        bounds: dict[str, tuple[float, float]] = {
            "steps": (1, 10_000),
            "guidance": (0, 1000),
            "true_cfg": (0, 1000),
            "seed": (0, SEEDS - 1),
            "frames": (1, 100_000),
            "fps": (1, 1000),
            "priority": (-8, 8),
            "preview_every": (0, 10_000),
            "previews": (0, 10_000),
            "queue_seconds": (0, math.inf),
            "run_seconds": (0, math.inf),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            # `not <=`, because NaN compares false.
            if value is not None and not least <= value <= most:
                raise FieldError(name, f"{name} is {value}; it has to be from {least} to {most}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise FieldError("strength", f"strength is {self.strength}; it has to be above 0 and at most 1")
        if self.size is not None and not all(side >= 1 for side in self.size):
            raise FieldError("size", f"size is {self.size[0]}x{self.size[1]}; both sides have to be 1 or more")
        if (self.mask or self.strength) and not self.images:
            raise FieldError("image", "a mask or a strength needs an image too")
        # A spelling may also name a file; that is for who starts a server.
        if self.cache is not None and (
            "/" in self.cache or "\\" in self.cache or self.cache.endswith(FILES) or "file=" in self.cache
        ):
            raise FieldError("cache", "a cache is given by its name and values, such as teacache:threshold=0.2")
        for alias, weight in self.lora.items():
            if not math.isfinite(weight):
                raise FieldError("lora", f"the weight of LoRA {alias} is {weight}; it has to be a finite number")
        taken = sorted(RESERVED & self.arguments.keys())
        if taken:
            raise FieldError("arguments", f"arguments cannot set {', '.join(taken)}: the engine decides these")
        if said := sorted(SAID.keys() & self.arguments.keys()):
            raise FieldError("arguments", f"arguments cannot set {said[0]}; give {SAID[said[0]]} instead")
        if any("scale" in (self.arguments.get(name) or {}) for name in SHARED_STATE):
            raise FieldError("arguments", "a LoRA's weight is given by lora={alias: weight}, not in attention kwargs")

    def _check_kinds(self) -> None:
        for name, (kind, words) in KINDS.items():
            value = getattr(self, name)
            left_out = value is None and getattr(type(self), name, kind) is None
            if not left_out and not _is(value, kind):
                raise FieldError(name, f"{name} is {value!r:.100}; it has to be {words}")
        parts: dict[str, tuple[Any, Any]] = {
            "size": (self.size or (), Integral),
            "lora": (self.lora.values(), Real),
            "images": (self.images, Image.Image),
        }
        for name, (values, kind) in parts.items():
            if not all(_is(value, kind) for value in values):
                raise FieldError(name, f"{name} is {getattr(self, name)!r:.100}; it has to be {KINDS[name][1]}")
        if self.size is not None and len(self.size) != 2:
            raise FieldError("size", f"size is {self.size!r:.100}; it has to be {KINDS['size'][1]}")

    def previewed(self, step: int, *, of: int) -> bool:
        """Whether a preview is wanted after so many of all steps; the last one's is the picture itself."""
        if not 0 < step < of:
            return False
        if self.preview_every:
            return step % self.preview_every == 0
        return step in {of * number // (self.previews + 1) for number in range(1, self.previews + 1)}


def _is(value: Any, kind: Any) -> bool:
    # Python counts True as 1.
    return isinstance(value, kind) and not (kind in (Integral, Real) and isinstance(value, bool))
