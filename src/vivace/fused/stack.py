"""Linears side by side as one weight, so that one GEMM computes them all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.row import Quantize, RowScaled
from vivace.lora.side import side_of
from vivace.memory.joined import followed, join
from vivace.quant.linear import QuantLinear, stackable, stacked


class Stack:
    """Linears with the same input as one linear of `[sum of their outputs, inputs]`, in 16 bit or quantised.

    Their own parameters become views of it: nothing is stored twice, a weight edited in place is seen here, and
    `state_dict` is unchanged. The undo gives every parameter its own storage back. Linears that are not alike (some
    quantised, or in different ways) keep their own storage and are called one by one. Where streaming brings their
    parameters elsewhere, side by side as they are, the stack goes with them.
    """

    def __init__(self, linears: Sequence[torch.nn.Linear | QuantLinear], *, undo: ExitStack) -> None:
        self.linears = tuple(linears)
        self._apart = not stackable(linears)
        if self._apart:
            return
        biases = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "either every linear of a stack has a bias or none"
        self.bias = join(biases, undo) if biases else None
        quantised = [linear for linear in linears if isinstance(linear, QuantLinear)]
        self._quantised = stacked(quantised, self.bias, undo=undo) if quantised else None
        if self._quantised is None:
            plain = [linear.weight for linear in linears if isinstance(linear, torch.nn.Linear)]
            self.weight = join(plain, undo)  # [sum of outputs, inputs]

    @property
    def takes(self) -> Quantize | None:
        """What a kernel in front is to make of this linear's input: `quantize=stack.takes`."""
        beside = any(side_of(linear) is not None for linear in self.linears)  # adapters read the input in 16 bit
        return None if beside or self._apart or self._quantised is None else self._quantised.takes

    def part(self, which: slice) -> Stack:
        """Some neighbours of its linears: views of what it has, good for as long as it is."""
        part = copy.copy(self)
        part.linears = self.linears[which]
        if self._apart:
            return part
        start = sum(linear.out_features for linear in self.linears[: which.start])
        rows = slice(start, start + sum(linear.out_features for linear in part.linears))
        part.bias = None if self.bias is None else self.bias[rows]
        if self._quantised is None:
            part.weight = self.weight[rows]
        else:
            part._quantised = self._quantised.part(rows)
        return part

    def __call__(self, x: torch.Tensor | RowScaled) -> torch.Tensor:
        if self._apart:
            return torch.cat([linear(x) for linear in self.linears], dim=-1)
        self._follow()
        if isinstance(x, RowScaled):
            assert self._quantised is not None
            return self._quantised(x)
        out = F.linear(x, self.weight, self.bias) if self._quantised is None else self._quantised(x)
        start = 0
        for linear in self.linears:
            end = start + linear.out_features
            if (side := side_of(linear)) is not None:
                side.add_to(out[..., start:end], x)
            start = end
        return out

    def _follow(self) -> None:
        first = self.linears[0]
        if isinstance(first, QuantLinear):
            assert self._quantised is not None
            self._quantised.follow(first)
        else:
            self.weight = followed(self.weight, first.weight)


def takes(*readers: Any) -> Quantize | None:
    """The row-scaled form (`quantize=` of a kernel) that all of `readers`, which share an input, take; None: 16 bit."""
    # Adapters beside a layer read its input in 16 bit.
    forms = {None if side_of(reader) is not None else getattr(reader, "takes", None) for reader in readers}
    return forms.pop() if len(forms) == 1 else None
