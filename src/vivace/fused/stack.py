"""Linears side by side as one weight, so that one GEMM computes them all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F

from vivace.side import side_of


class Stack:
    """Linears with the same input as one linear of `[sum of their outputs, inputs]`.

    Their own parameters become views of it: nothing is stored twice, a weight edited in place is seen here, and
    `state_dict` is unchanged. The undo gives every parameter its own storage back.
    """

    def __init__(self, linears: Sequence[torch.nn.Linear], *, undo: ExitStack) -> None:
        self.linears = tuple(linears)
        self.weight = _join([linear.weight for linear in linears], undo)  # [sum of outputs, inputs]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "either every linear of a stack has a bias or none"
        self.bias = _join(biases, undo) if biases else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.weight, self.bias)
        start = 0
        for linear in self.linears:
            end = start + linear.out_features
            if (side := side_of(linear)) is not None:
                side.add_to(out[..., start:end], x)
            start = end
        return out


def _join(parameters: Sequence[torch.Tensor], undo: ExitStack) -> torch.Tensor:
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = rows
        undo.callback(_part, parameter, rows)
    return joined


def _part(parameter: torch.Tensor, rows: torch.Tensor) -> None:
    # A parameter that was moved or cast in the meantime has its own storage already.
    if parameter.data_ptr() == rows.data_ptr():
        parameter.data = parameter.data.clone()
