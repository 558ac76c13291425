"""This package's kernel for the few keys of a prompt, native attention for everything else."""

from __future__ import annotations

import torch

from vivace.attention.backend import Backend
from vivace.attention.native import NATIVE
from vivace.kernels.cross_attention import cross_attention

KEYS = 512
"""Longer sequences are what the library's kernels are made for."""
DEPTHS = range(16, 161, 8)


def serves(q: torch.Tensor, k: torch.Tensor, *, mask: torch.Tensor | None) -> bool:
    """Whether the kernel takes q `[B, Sq, H, D]` and k `[B, Sk, H, D]`."""
    return mask is None and 0 < k.shape[1] <= KEYS < q.shape[1] and q.shape[-1] in DEPTHS


def _few_keys(q, k, v, *, mask=None, scale=None):
    if not serves(q, k, mask=mask):
        return NATIVE.attend(q, k, v, mask=mask, scale=scale)
    return cross_attention(q, k, v, scale=scale)


FEW_KEYS = Backend(
    name="few_keys",
    attend=_few_keys,
    since=(8, 0),
    masks=True,
    leaves=f"native with a mask, over {KEYS} keys, for as few queries or heads of an odd size",
)
