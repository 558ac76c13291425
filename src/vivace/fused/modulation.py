"""Shift, scale and gate of every adaptive norm of a model, in one GEMM a step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch

from vivace.fused.stack import Stack


class Modulation:
    """The modulation linears of `norms` (name and linear, in any order) side by side.

    `spans[name]` is where that norm's chunks of `width` (None: as many as inputs) lie in the result, in the order in
    which its linear makes them.
    """

    def __init__(
        self, norms: Iterable[tuple[str, torch.nn.Linear]], *, undo: ExitStack, width: int | None = None
    ) -> None:
        linears, start = [], 0
        self.spans: dict[str, slice] = {}
        for name, linear in norms:
            chunks = linear.out_features // (width or linear.in_features)
            self.spans[name] = slice(start, start + chunks)
            linears.append(linear)
            start += chunks
        self.stack = Stack(linears, undo=undo)
        self.chunks = start

    def __call__(self, embedding: torch.Tensor) -> torch.Tensor:
        """All chunks [B, chunks, width], from the activated embedding [B, D] of time, guidance and pooled text."""
        return self.stack(embedding).unflatten(1, (self.chunks, -1))
