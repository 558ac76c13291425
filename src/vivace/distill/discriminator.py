"""The discriminator: a small convolutional network on the frozen teacher's features."""

from __future__ import annotations

import torch
from torch import nn

LAST = 4  # side of the map that the last convolution reads as a whole
GROUPS = 4


def make_discriminator(channels: int, side: int, *, width: int = 64) -> nn.Sequential:
    """Features [B, channels, side, side] to logits [B, n].

    Halves the side and doubles the width until a 4 x 4 map is left, which one convolution turns into a logit; longer
    or larger features give several. A map too small for two halvings begins with a convolution that keeps its side.
    Group norms between, none at the ends.
    """
    layers: list[nn.Module] = []
    before, after = channels, width
    if side < 4 * LAST:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
        before, after = after, 2 * after
    while side >= 2 * LAST:
        if layers:
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(_groups(after), after), nn.SiLU()]
        else:
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.SiLU()]
        before, after, side = after, min(2 * after, 8 * width), side // 2
    return nn.Sequential(*layers, nn.Conv2d(before, 1, min(LAST, side)), nn.Flatten())


def _groups(channels: int) -> int:
    return GROUPS if channels % GROUPS == 0 else 1


def clamp(discriminator: nn.Module, largest: float) -> None:
    """Cut every weight to at most `largest`, as Wasserstein's objective asks."""
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.clamp_(-largest, largest)
