"""Random tensors for a denoiser's benchmark inputs, on its device and in its dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError

if TYPE_CHECKING:
    import torch


def noise_for(denoiser: Any, *, seed: int) -> Callable[..., torch.Tensor]:
    """A function that draws a normal tensor of the shape it is given; the same `seed` draws the same sequence."""
    import torch

    # Shapes alone, on the "meta" device, have no numbers to draw.
    generator = None if denoiser.device.type == "meta" else torch.Generator(denoiser.device).manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=denoiser.device, dtype=denoiser.dtype)

    return noise


def only_stills(family: str, frames: int) -> None:
    """Raises InputError for more than one frame, where a family draws single pictures."""
    if frames != 1:
        raise InputError(f"{family} draws single pictures, got frames={frames}; pass frames=1")
