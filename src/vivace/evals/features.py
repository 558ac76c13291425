"""Pictures to feature vectors, a batch at a time, with any module that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from vivace.errors import InputError


@torch.no_grad()
def extract(module: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`module(pictures)` for every batch [B, 3, H, W] in [0, 1], as float64 [B, D] on the CPU.

    A generator, so that tens of thousands of pictures pass through without being held: feed each batch to a
    `Moments`, or `torch.cat` them where the features themselves fit.
    Raises InputError where the module gives anything but one finite vector a picture.
    """
    for pictures in batches:
        features = module(pictures)
        if features.ndim != 2 or len(features) != len(pictures):
            raise InputError(
                f"a feature module gives one vector a picture, [{len(pictures)}, D], got {list(features.shape)}; "
                "pool its spatial dimensions away"
            )
        yield checked(features).cpu()


def checked(features: torch.Tensor) -> torch.Tensor:
    """`features` [N, D] in float64; raises InputError where they are not a table of finite numbers."""
    if features.ndim != 2 or not features.is_floating_point():
        raise InputError(f"features are a floating point [N, D] tensor, got {features.dtype} {list(features.shape)}")
    broken = int((~features.isfinite()).any(dim=1).sum())
    if broken:
        raise InputError(f"{broken} of {len(features)} feature vectors are not finite; look for NaN in the pictures")
    return features.to(torch.float64)
