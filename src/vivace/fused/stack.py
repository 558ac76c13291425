"""Linears side by side as one weight, so that one GEMM computes them all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.few_rows_linear import few_rows_linear
from vivace.kernels.row import Quantize, RowScaled
from vivace.lora.room import Room, Rows, room_for
from vivace.lora.side import side_of
from vivace.lora.together import together
from vivace.memory.joined import followed, join
from vivace.quant.linear import QuantLinear, stackable, stacked
from vivace.quant.storage import INT8_WEIGHTS


class Stack:
    """Linears with the same input as one linear of `[sum of their outputs, inputs]`, in 16 bit or quantised.

    Their own parameters become views of it: nothing is stored twice, a weight edited in place is seen here, and
    `state_dict` is unchanged. The undo gives every parameter its own storage back. Linears that are not alike (some
    quantised, or in different ways) keep their own storage and are called one by one. What adapters beside them make
    of the input is added, or with `room` for it goes through the same product. Where streaming brings their parameters
    elsewhere, side by side as they are, the stack goes with them.
    """

    def __init__(
        self, linears: Sequence[torch.nn.Linear | QuantLinear], *, undo: ExitStack, room: Room | None = None
    ) -> None:
        self.linears = tuple(linears)
        self.room = room
        self._apart = not stackable(linears)
        if self._apart:
            return
        biases = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "either every linear of a stack has a bias or none"
        self.bias = join(biases, undo) if biases else None
        quantised = [linear for linear in linears if isinstance(linear, QuantLinear)]
        self._quantised = stacked(quantised, self.bias, undo=undo) if quantised else None
        self._adapters = None if room else together(linears, undo=undo)
        starts = accumulate((linear.out_features for linear in linears), initial=0)
        pairs = zip(starts, map(side_of, linears), strict=False)
        self._sides = [(start, side) for start, side in pairs if side is not None]
        if self._quantised is None:
            plain = [linear for linear in linears if isinstance(linear, torch.nn.Linear)]
            # [sum of outputs, inputs], behind which come the columns for adapters' ranks
            self.weight = room.widen(plain) if room else join([linear.weight for linear in plain], undo)

    @property
    def takes(self) -> Quantize | None:
        """What a kernel in front is to make of this linear's input: `quantize=stack.takes`."""
        beside = any(side_of(linear) is not None for linear in self.linears)  # adapters read the input in 16 bit
        return None if beside or self._apart or self._quantised is None else self._quantised.takes

    @property
    def columns(self) -> int:
        """The room that a kernel in front is to leave behind each row of the input: `room=stack.columns`."""
        return self.room.columns if self.room else 0

    def part(self, which: slice) -> Stack:
        """Some neighbours of its linears: views of what it has, good for as long as it is."""
        assert self.room is None, "a part would have room of its own"
        part = copy.copy(self)
        part.linears = self.linears[which]
        if self._apart:
            return part
        start = sum(linear.out_features for linear in self.linears[: which.start])
        rows = slice(start, start + sum(linear.out_features for linear in part.linears))
        part.bias = None if self.bias is None else self.bias[rows]
        part._adapters = self._adapters and self._adapters.part(which)
        if self._quantised is None:
            part.weight = self.weight[rows]
        else:
            part._quantised = self._quantised.part(rows)
        return part

    def __call__(self, x: torch.Tensor | RowScaled | Rows) -> torch.Tensor:
        if self._apart:
            return torch.cat([linear(x) for linear in self.linears], dim=-1)
        if self.room is not None:
            return self._widened(filled(x, self))
        self._follow()
        if isinstance(x, RowScaled):
            assert self._quantised is not None
            return self._quantised(x)
        assert isinstance(x, torch.Tensor)
        out = F.linear(x, self.weight, self.bias) if self._quantised is None else self._quantised(x)
        if self._adapters is not None:
            self._adapters.add_to(out, x)
        return out

    @property
    def bare(self) -> bool:
        """Whether it is one weight that `few_rows_linear` reads, without adapters."""
        alone = not self._apart and self.room is None and not self._sides and self._adapters is None
        return alone and (self._quantised is None or self._quantised.format is INT8_WEIGHTS)

    def unless(self, found: torch.Tensor, x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """A `bare` one of a few rows [..., K]; where `found` [M], rows of `made` [M, N], and no weight is read."""
        weight = {"values": self.weight} if self._quantised is None else self._quantised.packed
        out = few_rows_linear(x.flatten(0, -2), bias=self.bias, made=made, found=found, **weight)
        return out.view(*x.shape[:-1], -1)

    def gelu(self, x: torch.Tensor | Rows) -> torch.Tensor | None:
        """GELU (tanh) of rows with room through this linear, applied as the product is stored; None: not so here."""
        if self.room is None or self.bias is None or any(side.bias is not None for _, side in self._sides):
            return None
        rows = filled(x, self)
        made = torch._addmm_activation(self.bias, self._read(rows), self.weight.t(), use_gelu=True)
        return made.view(*rows.x.shape[:-1], -1)

    def _widened(self, x: Rows) -> torch.Tensor:
        rows, weight = self._read(x), self.weight.t()
        out = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        for start, side in self._sides:
            if side.bias is not None:
                out[:, start : start + len(side.bias)] += side.bias
        return out.view(*x.x.shape[:-1], -1)

    def _read(self, x: Rows) -> torch.Tensor:
        """The columns that the weight has too."""
        return x.wide[:, : self.weight.shape[1]]

    def _follow(self) -> None:
        first = self.linears[0]
        if isinstance(first, QuantLinear):
            assert self._quantised is not None
            self._quantised.follow(first)
        else:
            self.weight = followed(self.weight, first.weight)


def readers(*groups: Sequence[Any], undo: ExitStack) -> list[Any]:
    """What reads the rows that a norm makes, one product for each of `groups` of linears.

    That is a stack, with room for adapters where all are plain linears and some have them; or a lone linear itself.
    """
    room = room_for(*groups, undo=undo)
    return [group[0] if len(group) == 1 and room is None else Stack(group, undo=undo, room=room) for group in groups]


def filled(x: Any, reader: Any) -> Any:
    """Rows with what their adapters make of them behind them, for all that read them; as they are without any."""
    room = getattr(reader, "room", None)
    return x if room is None or isinstance(x, Rows) else room.fill(x)


def asks(*readers: Any) -> dict[str, Any]:
    """What a norm is to make for all of `readers`, which share an input, as its keywords."""
    return {"quantize": takes(*readers), "room": max(getattr(reader, "columns", 0) for reader in readers)}


def takes(*readers: Any) -> Quantize | None:
    """The row-scaled form (`quantize=` of a kernel) that all of `readers`, which share an input, take; None: 16 bit."""
    # Adapters beside a layer read its input in 16 bit.
    forms = {None if side_of(reader) is not None else getattr(reader, "takes", None) for reader in readers}
    return forms.pop() if len(forms) == 1 else None
