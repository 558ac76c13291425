"""The adapters of several linears that read one input, where their products are already made."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch

from vivace.lora.side import Side, side_of


class Run(NamedTuple):
    """Neighbours whose adapters are alike in shape."""

    first: int  # index of the first linear
    up: torch.Tensor  # [how many, out, R]

    def part(self, which: range) -> Run | None:
        """Those of its linears whose indices are in `which`, counted from there."""
        start, stop = max(self.first, which.start), min(self.first + len(self.up), which.stop)
        return Run(start - which.start, self.up[start - self.first : stop - self.first]) if start < stop else None


class Together:
    """The adapters of `linears`, which read one input and write side by side.

    One product goes into all their ranks, and one out of every run of neighbours that are alike: for q, k and v as many
    bytes as one a linear and a third of the launches, for the modulation of FLUX's 76 norms 3 launches instead of 152.
    Block-diagonal ranks would take one product for any linears, which for those norms is a weight of 13 GB.
    """

    def __init__(self, linears: Sequence[Any], *, undo: ExitStack) -> None:
        self.sides = [side_of(linear) for linear in linears]
        self._outputs = [0, *accumulate(linear.out_features for linear in linears)]
        self._ranks = [0, *accumulate(0 if side is None else side.capacity for side in self.sides)]
        there = [side for side in self.sides if side is not None]
        self.down = torch.cat([side.down for side in there])  # [sum of R, K]
        self.runs = []
        for first, alike in _alike(self.sides):
            run = Run(first, torch.stack([side.up for side in alike]))
            self.runs.append(run)
            for index, (side, up) in enumerate(zip(alike, run.up, strict=True), start=first):
                down = self.down[self._ranks[index] : self._ranks[index + 1]]
                undo.callback(side.lie(down=down, up=up))

    def part(self, which: slice) -> Together | None:
        """The adapters of some neighbours, as views of what is here; None where they have none."""
        indices = range(len(self.sides))[which]
        part = copy.copy(self)
        part.sides = self.sides[which]
        if not any(part.sides):
            return None
        part._outputs, part._ranks = (
            [one - ends[indices.start] for one in ends[indices.start : indices.stop + 1]]
            for ends in (self._outputs, self._ranks)
        )
        part.down = self.down[self._ranks[indices.start] : self._ranks[indices.stop]]
        part.runs = [cut for run in self.runs if (cut := run.part(indices)) is not None]
        return part

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add what the adapters make of `x` [B, ..., K] to the linears' output `out` [B, ..., sum of outputs]."""
        h = torch.nn.functional.linear(x.to(self.down.dtype), self.down)  # [B, ..., sum of R]
        strengths = [side.rows(len(x)) for side in self.sides if side is not None and side.strengths is not None]
        if strengths:
            h = h * torch.cat(strengths, -1).view(len(x), *[1] * (x.ndim - 2), -1)
        rows, h = out.view(-1, out.shape[-1]), h.view(-1, h.shape[-1])
        for first, up in self.runs:
            last = first + len(up)
            y = rows[:, self._outputs[first] : self._outputs[last]].unflatten(1, up.shape[:2])
            ranks = h[:, self._ranks[first] : self._ranks[last]].unflatten(1, (len(up), -1))
            y.transpose(0, 1).baddbmm_(ranks.transpose(0, 1), up.transpose(1, 2))
        for side, start in zip(self.sides, self._outputs, strict=False):
            if side is not None and side.bias is not None:
                rows[:, start : start + len(side.bias)] += side.bias


def together(linears: Sequence[Any], *, undo: ExitStack) -> Together | None:
    """The adapters of linears that read one input, None where they have none."""
    return Together(linears, undo=undo) if any(side_of(linear) is not None for linear in linears) else None


def _alike(sides: Sequence[Side | None]) -> Iterator[tuple[int, list[Side]]]:
    """Neighbours with adapters of one shape, and the index of the first of them."""
    for shape, run in groupby(enumerate(sides), lambda pair: None if pair[1] is None else pair[1].up.shape):
        pairs = list(run)
        if shape is not None:
            yield pairs[0][0], [side for _, side in pairs if side is not None]
