"""Adapters inside the products of the linears they stand beside: rows `[x | h]` times weights `[W | up]`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from vivace.lora.side import plain, side_of
from vivace.memory.joined import movable, share


class Rows(NamedTuple):
    """An input with what its adapters make of it behind it, ready for the products."""

    x: torch.Tensor  # [B, ..., K]
    wide: torch.Tensor  # [B ..., K + R]


class Room:
    """The columns behind an input in which its adapters' ranks lie.

    `groups` of linears read the input in one product each. A product that adds to what another one wrote reads and
    writes all of it, and none of those that apply an activation can be added to; here every product stays one. The
    ranks of the first group lie first: each group reads as far as its own, and multiplies with zeros what is not its.
    """

    def __init__(self, *groups: Sequence[torch.nn.Linear], undo: ExitStack) -> None:
        linears = [linear for group in groups for linear in group]
        self.sides = {linear: side for linear in linears if (side := side_of(linear)) is not None}
        self.inputs, weight = linears[0].in_features, linears[0].weight
        self.starts: dict[torch.nn.Linear, int] = {}
        self.columns = 0
        for linear, side in self.sides.items():
            self.starts[linear] = self.columns
            self.columns += side.capacity
        self.down = weight.new_empty(self.columns, self.inputs)  # [R, K]
        self._into = self.down.t()
        self._undo = undo

    def widen(self, linears: Sequence[torch.nn.Linear]) -> torch.Tensor:
        """The weights of a group, one below another, as far as the group reads: [sum of outputs, K + ranks].

        Their parameters become views of it until the undo, and so do their adapters' factors.
        """
        ends = [self.starts[linear] + self.sides[linear].capacity for linear in linears if linear in self.sides]
        outputs, first = sum(linear.out_features for linear in linears), linears[0].weight
        wide = first.new_empty(outputs, self.inputs + max(ends, default=0))
        wide[:, self.inputs :].zero_()
        row = 0
        for linear in linears:
            rows = wide[row : (row := row + linear.out_features)]
            share(linear.weight, rows[:, : self.inputs], self._undo)
            if (side := self.sides.get(linear)) is not None:
                start = self.starts[linear]
                ranks = slice(start, start + side.capacity)
                up = rows[:, self.inputs + ranks.start : self.inputs + ranks.stop]
                self._undo.callback(side.lie(down=self.down[ranks], up=up))
        return wide

    def fill(self, x: torch.Tensor) -> Rows:
        """`x` [B, ..., K] with its adapters' products behind it: where it lies if that has the room, else in a copy."""
        count, width = x.numel() // self.inputs, self.inputs + self.columns
        if _lies_in_rows(x, width):
            wide = x.as_strided((count, width), (width, 1))
        else:
            wide = x.new_empty(count, width)
            wide[:, : self.inputs] = x.reshape(count, self.inputs)
        h = wide[:, self.inputs :]
        torch.mm(wide[:, : self.inputs], self._into, out=h)
        strengths = [side.rows(len(x)) for side in self.sides.values() if side.strengths is not None]
        if strengths:
            h.view(len(x), -1, self.columns).mul_(torch.cat(strengths, -1).unsqueeze(1))
        return Rows(x, wide)


def room_for(*groups: Sequence[Any], undo: ExitStack) -> Room | None:
    """Room for the adapters of linears with the same input, in `groups` of one product each; None where none serves,
    or where their weights have to stay where they lie."""
    linears = [linear for group in groups for linear in group]
    if not movable() or not all(map(plain, linears)) or all(side_of(linear) is None for linear in linears):
        return None
    return Room(*groups, undo=undo)


def _lies_in_rows(x: torch.Tensor, width: int) -> bool:
    """Whether `x` [B, S, K] is the beginning of rows of `width`, as a kernel in front was asked to leave it."""
    rows = x.ndim == 3 and x.stride() == (x.shape[1] * width, width, 1) and not x.storage_offset()
    return rows and x.untyped_storage().nbytes() == x.shape[0] * x.shape[1] * width * x.itemsize
