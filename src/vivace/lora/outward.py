"""Adapters behind the outputs of the linear they stand beside: weights `[W; down]` make `[y | h]`, then `y + h up`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from vivace.lora.side import plain, side_of
from vivace.memory.joined import movable, share


class Outward:
    """A linear of several inputs side by side, whose adapters read them in the products that it makes of them anyway.

    A product of its own for so few columns leaves most multiprocessors idle for as long as its rows are deep: 60
    microseconds of FLUX's single blocks at 1024², where 64 columns more of the wide products take 12. It is not for
    any linear: where a product fills its waves of tiles to the last one, as those of 4,096 rows do, columns more may
    cost a wave.
    """

    def __init__(self, linear: torch.nn.Linear, *, undo: ExitStack) -> None:
        side = side_of(linear)
        assert side is not None
        self.side, self.outputs = side, linear.out_features
        total = self.outputs + side.capacity
        self.weight = linear.weight.new_empty(total, linear.in_features)
        share(linear.weight, self.weight[: self.outputs], undo)
        undo.callback(side.lie(down=self.weight[self.outputs :], up=torch.empty_like(side.up)))
        self.bias = None
        if linear.bias is not None:
            self.bias = linear.bias.new_zeros(total)
            share(linear.bias, self.bias[: self.outputs], undo)

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Of inputs [B, S, K_1] and [B, S, K_2] the output [B, S, D], whose rows lie further apart."""
        inner, weight = first.shape[-1], self.weight.t()
        rows = first.reshape(-1, inner)
        made = rows @ weight[:inner] if self.bias is None else torch.addmm(self.bias, rows, weight[:inner])
        made.addmm_(second.reshape(len(rows), -1), weight[inner:])
        y, h = made[:, : self.outputs], made[:, self.outputs :]
        if self.side.strengths is not None:
            h.unflatten(0, (len(first), -1)).mul_(self.side.rows(len(first)).unsqueeze(1))
        y.addmm_(h, self.side.up.t())
        if self.side.bias is not None:
            y += self.side.bias
        return y.unflatten(0, first.shape[:-1])


def outward(linear: Any, *, undo: ExitStack) -> Outward | None:
    """A plain linear with its adapters; None where it is another kind, has none, or has to stay where it lies."""
    return Outward(linear, undo=undo) if movable() and plain(linear) and side_of(linear) is not None else None
