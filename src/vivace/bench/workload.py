"""What is timed: one denoiser forward, or one whole pipeline call, of one model at one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.family import Family, Variant

TINY = {"size": (64, 64), "text_tokens": 8, "steps": 2}
"""In place of a variant's own values, for the few-thousand-parameter pipelines of `Family.tiny`."""


OWN = ("size", "batch", "frames", "text_tokens", "steps", "guidance")
"""What a call takes from its variant."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model, its weights, and the shape of one call."""

    family: str
    variant: str
    model: str | None  # a folder, file or hub id; None: random weights at true size
    tiny: bool  # the family's tiny random pipeline instead
    end_to_end: bool  # text encoders, all steps and VAE; else one denoiser forward
    device: str
    dtype: str
    size: tuple[int, int]  # width, height in pixels
    batch: int
    frames: int
    text_tokens: int
    steps: int
    guidance: float
    control: bool = False  # a ControlNet beside the denoiser, or what one hands it

    @property
    def facts(self) -> Family:
        return FAMILIES[self.family]

    @property
    def published(self) -> Variant:
        return self.facts.variant(self.variant)

    @property
    def pipeline(self) -> str:
        """The diffusers pipeline that is called."""
        own = _controlled(self.facts) if self.control else self.published.pipeline
        return own or self.facts.pipelines[0]

    @property
    def name(self) -> str:
        """One line that says what is timed."""
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        what = f"end to end, {self.steps} steps" if self.end_to_end else f"one denoiser forward{batch}"
        what += " with a ControlNet" if self.control else ""
        weights = f"{self.family}:{self.variant}{' tiny' if self.tiny else ''}" if self.model is None else self.model
        width, height = self.size
        return f"{weights} {width}x{height}{frames}, {what}, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {**asdict(self), "size": list(self.size)}
        # Results that were kept before there was one say nothing of it, and go on counting.
        return values if self.control else {name: value for name, value in values.items() if name != "control"}


def from_dict(values: Mapping[str, Any]) -> Workload:
    """The Workload that `to_dict` gave."""
    return Workload(**{**values, "size": tuple(values["size"])})


def workload_of(
    name: str,
    *,
    device: str,
    dtype: str,
    model: str | None = None,
    tiny: bool = False,
    end_to_end: bool = False,
    control: bool = False,
    **shape: Any,
) -> Workload:
    """The workload of `FAMILY[:variant]`; what `shape` leaves out or gives as None is the model's or variant's own.

    Raises InputError for an unknown family or variant, for a size its autoencoder cannot make, for frames of a still
    picture, and for a ControlNet beside anything but a UNet of random weights.
    """
    family_name, _, variant_name = name.partition(":")
    if family_name not in FAMILIES:
        raise InputError(f"unknown family {family_name!r}; vivace knows {', '.join(FAMILIES)}")
    family = FAMILIES[family_name]
    if model and tiny:
        raise InputError("--model and --tiny exclude each other; give one")
    if control and (model or family.denoiser_class != "UNet2DConditionModel" or not _controlled(family)):
        raise InputError("--control is for random weights of a Stable Diffusion UNet, such as sd:1.5; leave it out")
    variant_name = variant_name or next(iter(family.variants))
    variant = family.variant(variant_name)
    own = {name: getattr(variant, name) for name in OWN}
    if model:
        own |= _of_model(model, family)
    if tiny:
        own |= {**TINY, "frames": 5 if family.media == "video" else 1}
    own |= {name: value for name, value in shape.items() if value is not None}
    _check_frames(own["frames"], family)
    multiple = variant.multiple or family.multiple
    if any(side % multiple or side <= 0 for side in own["size"]):
        raise InputError(f"--size {own['size'][0]}x{own['size'][1]}: {family.title} needs multiples of {multiple}")
    names = {"family": family_name, "variant": variant_name, "model": model, "tiny": tiny, "end_to_end": end_to_end}
    return Workload(**names, device=device, dtype=dtype, control=control, **own)


def _check_frames(frames: int, family: Family) -> None:
    if frames > 1 and family.media != "video":
        raise InputError(f"--frames {frames}: {family.title} draws single pictures; leave it out")
    if (frames - 1) % family.packed:
        near = round((frames - 1) / family.packed) * family.packed + 1
        raise InputError(
            f"--frames {frames}: {family.title} makes multiples of {family.packed} and one; the nearest is {near}"
        )


def _controlled(family: Family) -> str | None:
    """The family's first pipeline with a ControlNet."""
    return next((name for name in family.pipelines if "ControlNet" in name), None)


def _of_model(model: str, family: Family) -> dict[str, Any]:
    """What a model of one's own was made for. Raises InputError where it is of another family."""
    from vivace.load import find

    source = find(model)
    if source.family is not family:
        found = source.family.name if source.family else "no known family"
        raise InputError(f"{model} is a {source.pipeline} ({found}), not of {family.name}; name its family")
    return {**({"size": source.size} if source.size else {}), **source.defaults}
