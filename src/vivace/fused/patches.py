"""A picture's patches as tokens: one product, which adds where they lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vivace.lora.side import side_of


def places_of(embed: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What is added to the patches of pictures of the shape of `x` [B, C, H, W]: [1, S, D]. None: `embed` does it all.

    `embed` is diffusers' PatchEmbed. The tokens of an empty picture are the projection's bias and the positions.
    """
    plain = type(embed.proj) is torch.nn.Conv2d and side_of(embed.proj) is None and embed.norm is None
    whole = not any(side % embed.patch_size for side in x.shape[-2:])
    return embed(torch.zeros_like(x[:1])) if plain and whole else None


def tokens_of(embed: Any, x: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """The patches of `x` [B, C, H, W], projected, at their `places`: [B, S, D], contiguous.

    The sum is rounded once, where stock rounds the projection, the sum in fp32 and that again (SD 3.5 medium, H200:
    eight launches of 0.31 ms).
    """
    if places is None:
        return embed(x).contiguous()
    rows = F.pixel_unshuffle(x, embed.patch_size).flatten(2).transpose(1, 2)  # [B, S, C * patch * patch]
    weight = embed.proj.weight.flatten(1).t()
    return torch.baddbmm(*(one.expand(len(x), -1, -1) for one in (places, rows, weight)))
