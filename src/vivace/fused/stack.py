"""Linears side by side as one weight, so that one GEMM computes them all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F

from vivace.kernels.row import Quantize, RowScaled
from vivace.quant.linear import QuantLinear, stacked
from vivace.side import side_of


class Stack:
    """Linears with the same input as one linear of `[sum of their outputs, inputs]`, in 16 bit or quantised.

    Their own parameters become views of it: nothing is stored twice, a weight edited in place is seen here, and
    `state_dict` is unchanged. The undo gives every parameter its own storage back.
    """

    def __init__(self, linears: Sequence[torch.nn.Linear | QuantLinear], *, undo: ExitStack) -> None:
        self.linears = tuple(linears)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "either every linear of a stack has a bias or none"
        self.bias = join(biases, undo) if biases else None
        quantised = [linear for linear in linears if isinstance(linear, QuantLinear)]
        assert len(quantised) in (0, len(linears)), "either every linear of a stack is quantised or none"
        self._quantised = stacked(quantised, self.bias, undo=undo) if quantised else None
        if self._quantised is None:
            plain = [linear.weight for linear in linears if isinstance(linear, torch.nn.Linear)]
            self.weight = join(plain, undo)  # [sum of outputs, inputs]

    @property
    def takes(self) -> Quantize | None:
        """What a kernel in front is to make of this linear's input: `quantize=stack.takes`."""
        # Adapters read the input in 16 bit.
        return self._quantised.takes if self._quantised and not beside(*self.linears) else None

    def __call__(self, x: torch.Tensor | RowScaled) -> torch.Tensor:
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


def beside(*linears: torch.nn.Module) -> bool:
    """Whether adapters stand beside any of these: then it is to be called, its weight alone is not all it computes."""
    return any(side_of(linear) is not None for linear in linears)


def join(parameters: Sequence[torch.Tensor], undo: ExitStack) -> torch.Tensor:
    """One tensor of all `parameters` along their first dimension, which become views of it until the undo."""
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = rows
        undo.callback(_part, parameter, rows)
    return joined


def _part(parameter: torch.Tensor, rows: torch.Tensor) -> None:
    # A parameter that was moved or cast in the meantime has its own storage already.
    if parameter.data_ptr() == rows.data_ptr():
        parameter.data = parameter.data.clone()
