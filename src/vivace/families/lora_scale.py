"""The strength of LoRA layers that travels in a denoiser's attention kwargs, applied around each part of a Split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def take_lora_scale(attention_kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, float]:
    """A denoiser's attention kwargs without the LoRA scale that travels in them, and that scale."""
    if attention_kwargs is None:
        return None, 1.0
    rest = dict(attention_kwargs)
    return rest, rest.pop("scale", 1.0)


@contextmanager
def lora_scaled(module: torch.nn.Module, scale: float) -> Iterator[None]:
    """LoRA layers inside `module` count `scale` times as much within the block."""
    if scale == 1.0:
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(module, scale)
    try:
        yield
    finally:
        unscale_lora_layers(module, scale)
