"""Norms of q and k whose results need no look to fit e4m3: the bound of an RMSNorm is a fact of its weights.

A head of D channels normalised to a mean square of 1 holds at most sqrt(D) in one of them (all heads together, where
the norm is across them), and rotary embedding keeps the length of a pair. The scale goes into the norm's weights, so
that the kernel which normalises has nothing more to do than to store in e4m3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vivace.kernels.row import FORMATS

LIMIT = FORMATS["fp8"].limit


class PackedNorms(NamedTuple):
    """The weights of a stream's norms, over scales with which q and k fit e4m3."""

    q_weight: torch.Tensor  # float32
    k_weight: torch.Tensor
    descale: torch.Tensor  # [1, 1, 1, 1] float32: q's scale times k's, with which logits are to be multiplied


def packed_norms(weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[PackedNorms]:
    """Those of streams with norms of q and k of these `weights`, whose heads are attended to together."""
    q_scale, k_scale = (_scale(kind) for kind in zip(*weights, strict=True))
    descale = (q_scale * k_scale).view(1, 1, 1, 1)
    return [PackedNorms(q.float() / q_scale, k.float() / k_scale, descale) for q, k in weights]


def _scale(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Nothing is read from the device: the scale stays there."""
    bounds = [weight.float().abs().amax() * len(weight) ** 0.5 for weight in weights]
    return (torch.stack(bounds).amax() / LIMIT).clamp_min(1e-12)
