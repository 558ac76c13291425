"""Shift, scale and gate of every adaptive norm of a model, in one GEMM a step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
import torch.nn.functional as F

from vivace.fused.stack import Stack


class Modulation:
    """The modulation linears of `norms` (name and linear, in any order) side by side.

    `spans[name]` is where that norm's chunks lie in the result, in the order in which its linear makes them.
    """

    def __init__(self, norms: Iterable[tuple[str, torch.nn.Linear]], *, undo: ExitStack) -> None:
        linears, start = [], 0
        self.spans: dict[str, slice] = {}
        for name, linear in norms:
            chunks = linear.out_features // linear.in_features
            self.spans[name] = slice(start, start + chunks)
            linears.append(linear)
            start += chunks
        self.stack = Stack(linears, undo=undo)

    def __call__(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All chunks, each `[B, D]`, from the embedding `[B, D]` of time, guidance and pooled text."""
        rows = self.stack(F.silu(embedding))
        return rows.view(len(embedding), -1, embedding.shape[-1]).unbind(1)
