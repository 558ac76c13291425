"""Identical text tokens, folded into one with a weight.

Tokens without positions that start identical stay identical through every layer. As keys, n of them weigh in the
softmax like one whose logit is raised by log(n); as queries, one result stands for all. That is exact, not an
approximation, and half the text work of a Stable Diffusion 3 without its T5 encoder. Where attention is slower with a
bias than with some more keys, the one key and value can be repeated instead: only they, after all the products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Text whose zero tail is folded, and what to add to the logits of its keys."""

    text: torch.Tensor  # [B, T', D]
    bias: torch.Tensor | None = None  # [1, 1, 1, T']; None: nothing was folded, or the key is to be repeated
    repeats: int = 0  # how often the last token's key and value come once more


def fold_zero_tokens(text: torch.Tensor, *, repeat: bool = False) -> Folded:
    """Fold the zero tokens at the end of `text` `[B, T, D]`: a bias, or a key to repeat. Waits for the device once."""
    if text.is_meta:
        return Folded(text=text)  # a rehearsal's text has no values
    used = text.ne(0).any(-1).any(0).nonzero()  # [n, 1]
    kept = int(used[-1]) + 1 if len(used) else 0
    zeros = text.shape[1] - kept
    if repeat:
        return Folded(text=text[:, : kept + 1], repeats=max(zeros - 1, 0))
    weights = log_weights(zeros, text.dtype)
    if zeros <= len(weights):
        return Folded(text=text)
    bias = F.pad(torch.tensor(weights, device=text.device, dtype=text.dtype), (kept, 0))
    return Folded(text=text[:, : kept + len(weights)], bias=bias.view(1, 1, 1, -1))


def log_weights(count: int, dtype: torch.dtype, *, tolerance: float = 1e-6) -> list[float]:
    """Numbers that `dtype` holds exactly, and whose exponentials sum to `count` within a relative `tolerance`.

    One is enough in fp32; in bf16 log(256) rounds by 0.014, which would misjudge the tokens by 1.4 %, and a second and
    third token make that up.
    """
    weights: list[float] = []
    left = float(count)
    while left > tolerance * count:
        weight = torch.tensor(math.log(left), dtype=dtype)
        if math.exp(weight.item()) > left * (1 + tolerance):
            weight = torch.nextafter(weight, weight.new_tensor(-math.inf))
        weights.append(weight.item())
        left -= math.exp(weights[-1])
    return weights
