"""What teacher and student see beside text and noise: where it comes from, and how it joins the denoiser's call.

A source is a function of a `Batch` and a `Setting` that returns a tensor; those of this file are in SOURCES, others are
named as `module:function`. The conditioner's `join` says what becomes of it (docs/distill.md has a custom one).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vivace.distill.call import Call, pack
from vivace.distill.config import Conditioner
from vivace.distill.data.sample import Batch
from vivace.errors import InputError


@dataclass(frozen=True)
class Setting:
    """What a source may use."""

    pipe: Any
    encode: Callable[[torch.Tensor], torch.Tensor]  # pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]
    generator: torch.Generator  # of this batch, on the CPU


Source = Callable[..., torch.Tensor]


def random_mask(batch: Batch, setting: Setting, *, least: float = 0.2, most: float = 0.8) -> torch.Tensor:
    """Rectangles to be painted anew, of sides between `least` and `most` of the picture's: [B, 1, H, W], 0 or 1."""
    count, _, height, width = batch.pixels.shape
    draw = torch.rand(count, 4, generator=setting.generator)
    mask = torch.zeros(count, 1, height, width)
    for index, (tall, wide, down, across) in enumerate(draw.tolist()):
        rows, columns = (
            round((least + (most - least) * part) * side) for part, side in ((tall, height), (wide, width))
        )
        top, left = round(down * (height - rows)), round(across * (width - columns))
        mask[index, :, top : top + rows, left : left + columns] = 1
    return mask.to(batch.pixels.device)


def masked_latents(batch: Batch, setting: Setting, **options: float) -> torch.Tensor:
    """For inpainting: a mask, and the latents of the picture without what it covers: [B, 1 + C, h, w]."""
    mask = random_mask(batch, setting, **options)
    latents = setting.encode(batch.pixels * (1 - mask))
    return torch.cat((F.interpolate(mask, latents.shape[2:]), latents), dim=1)


def low_resolution(batch: Batch, setting: Setting, *, factor: int = 4) -> torch.Tensor:
    """For super-resolution: the latents of the picture made `factor` times smaller and large again: [B, C, h, w]."""
    return setting.encode(enlarged(batch, setting, factor=factor) * 2 - 1)


def enlarged(batch: Batch, setting: Setting, *, factor: int = 4) -> torch.Tensor:
    """The picture made `factor` times smaller and large again: [B, 3, H, W] in [0, 1], for a ControlNet of tiles."""
    small = F.interpolate(batch.pixels, scale_factor=1 / factor, mode="area")
    return F.interpolate(small, batch.pixels.shape[2:], mode="bicubic").clamp(-1, 1) / 2 + 0.5


def pixels(batch: Batch, setting: Setting) -> torch.Tensor:
    """The picture itself, [B, 3, H, W] in [0, 1]: for pipelines that take an image."""
    return batch.pixels / 2 + 0.5


def extra(batch: Batch, setting: Setting, *, key: str = "control") -> torch.Tensor:
    """A further picture of the sample (`frog.control.png`): [B, 3, H, W] in [0, 1]."""
    if key not in batch.extras:
        raise InputError(f"no sample has a further picture {key!r}; shards hold it as NAME.{key}.png")
    return batch.extras[key] / 2 + 0.5


def edges(batch: Batch, setting: Setting, *, threshold: float = 0.15) -> torch.Tensor:
    """White edges on black, by Sobel's operator: [B, 3, H, W] in [0, 1]."""
    grey = (batch.pixels / 2 + 0.5).mean(1, keepdim=True)
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device) / 4
    both = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack((slope, slope.T))[:, None])
    return (both.norm(dim=1, keepdim=True) > threshold).float().expand(-1, 3, -1, -1)


def embedding(batch: Batch, setting: Setting, *, key: str | None = None) -> torch.Tensor:
    """The pipeline's own image encoder on the picture, or on a further one of the sample: [B, D]."""
    encoder = getattr(setting.pipe, "image_encoder", None)
    if encoder is None:
        raise InputError(f"a {type(setting.pipe).__name__} has no image encoder; write a source of your own")
    seen = batch.pixels if key is None else extra(batch, setting, key=key) * 2 - 1
    side = encoder.config.image_size
    return encoder(F.interpolate(seen, (side, side), mode="bilinear").to(encoder.dtype))[0]


SOURCES: dict[str, Source] = {
    "random_mask": random_mask,
    "masked_latents": masked_latents,
    "low_resolution": low_resolution,
    "enlarged": enlarged,
    "pixels": pixels,
    "extra": extra,
    "edges": edges,
    "embedding": embedding,
}
"""Sources by name."""


def source_of(name: str) -> Source:
    """The source of that name, or the `module:function`. Raises InputError."""
    if name in SOURCES:
        return SOURCES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"no source {name!r}; it is one of {', '.join(SOURCES)}, or module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the source {name} cannot be imported ({error}); is its module on PYTHONPATH?") from error


def picture_key(one: Conditioner) -> str | None:
    """Which further picture of a sample a conditioner reads: its option `key`, or its source's default."""
    parameter = inspect.signature(source_of(one.source)).parameters.get("key")
    return one.options.get("key", parameter.default) if parameter is not None else None


def inputs_of(conditioners: Sequence[Conditioner], batch: Batch, setting: Setting) -> dict[str, torch.Tensor]:
    """The arguments of the pipeline's call that conditioners give."""
    return {one.argument: _made(one, batch, setting) for one in conditioners if one.argument is not None}


def _made(one: Conditioner, batch: Batch, setting: Setting) -> torch.Tensor:
    """What a conditioner's source makes of a batch. Raises InputError for options that the source has not."""
    source = source_of(one.source)
    try:
        inspect.signature(source).bind(batch, setting, **one.options)
    except TypeError as error:
        raise InputError(f"the source {one.source} does not take these options: {error}; check conditioners") from error
    return source(batch, setting, **one.options)


def join(call: Call, conditioners: Sequence[Conditioner], batch: Batch, setting: Setting) -> Call:
    """The call with every conditioner that is not an argument joined to it. Raises InputError where one cannot be."""
    if any(one.join == "concatenated" for one in conditioners):
        # A text-to-image pipeline fills the channels that it knows nothing of with noise.
        call = replace(call, beside=None)
    for one in conditioners:
        if one.join != "argument":
            call = JOINS[one.join](call, _both(call, _made(one, batch, setting), one))
    return call


def _both(call: Call, value: torch.Tensor, one: Conditioner) -> torch.Tensor:
    """The value for the call's halves; the unguided one is blank where guidance is to strengthen the condition."""
    if not call.halves:
        return value
    return torch.cat((torch.zeros_like(value) if one.guided else value, value))


def _concatenated(call: Call, value: torch.Tensor) -> Call:
    value = pack(value) if call.packed else value
    if call.beside is not None:
        value = torch.cat((call.beside.to(value), value), dim=2 if call.packed else 1)
    return replace(call, beside=value)


def _cross_attended(call: Call, value: torch.Tensor) -> Call:
    """Tokens [B, T, D] (or one, [B, D]) after the text's."""
    kwargs = dict(call.kwargs)
    text = kwargs["encoder_hidden_states"]
    tokens = (value if value.ndim == 3 else value[:, None]).to(text)
    if tokens.ndim != 3 or tokens.shape[-1] != text.shape[-1]:
        raise InputError(
            f"a condition of shape {list(value.shape)} cannot join text as [B, T, {text.shape[-1]}]; "
            "give tokens of that width"
        )
    kwargs["encoder_hidden_states"] = torch.cat((text, tokens), dim=1)
    if (mask := kwargs.get("encoder_attention_mask")) is not None:
        kwargs["encoder_attention_mask"] = torch.cat((mask, mask.new_ones(tokens.shape[:2])), dim=1)
    if (places := kwargs.get("txt_ids")) is not None:
        kwargs["txt_ids"] = torch.cat((places, places.new_zeros(tokens.shape[1], places.shape[1])))
    return replace(call, kwargs=kwargs)


def _vector(call: Call, value: torch.Tensor) -> Call:
    """A vector [B, D] added to the pooled text."""
    kwargs = dict(call.kwargs)
    added = dict(kwargs.get("added_cond_kwargs") or {})
    holder, name = (kwargs, "pooled_projections") if "pooled_projections" in kwargs else (added, "text_embeds")
    if holder.get(name) is None or holder[name].shape != value.shape:
        raise InputError(f"this denoiser has no pooled text of shape {list(value.shape)} that a vector could join")
    holder[name] = holder[name] + value.to(holder[name])
    return replace(call, kwargs={**kwargs, "added_cond_kwargs": added} if added else kwargs)


JOINS: dict[str, Callable[[Call, torch.Tensor], Call]] = {
    "concatenated": _concatenated,
    "cross_attended": _cross_attended,
    "vector": _vector,
}
