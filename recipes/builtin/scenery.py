"""An endless supply of scenes on the device, and their pictures as a careless camera would take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vivace.builtin.render import render
from vivace.builtin.world import Scenes, holds_out, sample


class Supply:
    """Batches of fresh scenes; a pool is drawn ahead, since drawing reads sizes back to the host.

    `heldout`: "with" takes all combinations, "without" leaves the held-out ones away, "only" takes nothing else.
    """

    def __init__(self, seed: int, device: str, *, heldout: str = "with", pool: int = 1 << 16, **kwargs):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.heldout, self.pool, self.kwargs = heldout, pool, kwargs
        self.scenes: Scenes | None = None
        self.at = 0

    def take(self, n: int) -> Scenes:
        """The next n scenes (n at most a quarter of the pool)."""
        if self.scenes is None or self.at + n > len(self.scenes):
            scenes = sample(self.pool, self.generator, **self.kwargs)
            if self.heldout != "with":
                scenes = scenes[(holds_out(scenes) == (self.heldout == "only")).nonzero()[:, 0]]
            self.scenes, self.at = scenes, 0
        self.at += n
        return self.scenes[slice(self.at - n, self.at)]


def photographed(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W], each left clean or made softer, noisy, brighter or paler."""
    n, device = len(pictures), pictures.device

    def share(p: float) -> torch.Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator, device=device) < p).to(pictures.dtype)

    def uniform() -> torch.Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator, device=device)

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    wide = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
    soft, softer = share(0.3) * uniform(), share(0.15)
    out = torch.lerp(pictures, torch.lerp(blurred, wide, softer), soft)
    noise = torch.randn(pictures.shape, generator=generator, device=device, dtype=pictures.dtype)
    out = out + share(0.3) * 0.05 * uniform() * noise
    return (out * (1 + share(0.3) * 0.08 * (uniform() - 0.5)) + share(0.3) * 0.06 * (uniform() - 0.5)).clamp(0, 1)


def pictures_of(scenes: Scenes, *, drawer=render, chunk: int = 512) -> torch.Tensor:
    """Pictures [B, 3, 256, 256] in bfloat16, rendered chunk by chunk."""
    return torch.cat([drawer(scenes[i : i + chunk]).bfloat16() for i in range(0, len(scenes), chunk)])
