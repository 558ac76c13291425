"""Blocks of one stream that attends to itself and to a text which no block changes.

The modulation is adaLN-single (arXiv 2310.00426): six vectors of time for all blocks, and a table of each block's own
that is added to them. The two terms are never put together: the kernels add them where they use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from vivace.family import State
from vivace.fused.joint import Ahead, Mlp, ahead_for
from vivace.fused.parts import Parts
from vivace.fused.stack import asks
from vivace.kernels.row import Sum


class Attention(Protocol):
    """The attention of a stream, to itself or to the text in the context; `reader` is the linear that reads it."""

    reader: Any

    def __call__(self, normed: Any, context: Mapping[str, Any]) -> torch.Tensor: ...


class CrossBlock:
    """Self attention, cross attention and MLP of a stream [B, S, D]; every residual computes the norm that follows it.

    `cross_norm` is the LayerNorm in front of cross attention, None where that reads the stream as it is. The state's
    context holds the six vectors of time, "modulation": each [B, D], or [B, S, D] where tokens have times of their own.
    """

    def __init__(
        self,
        *,
        table: torch.Tensor,  # [..., 6, D]
        index: int,
        attention: Attention,
        cross: Attention,
        cross_norm: torch.nn.LayerNorm | None,
        mlp: Any,
        eps: float,
        parts: Parts,
    ) -> None:
        self.table, self.index, self.eps = table, index, eps
        self.attention, self.cross, self.cross_norm, self.mlp = (
            attention,
            cross,
            cross_norm,
            Mlp.of(mlp, undo=parts.undo),
        )
        self.elementwise = parts.elementwise
        self.following: CrossBlock | None = None

    def __call__(self, state: State) -> State:
        context, following = state.context, self.following
        x, y, gate = self.advance(state.x, self._normed(state), context)
        if following is None:
            return replace(state, x=self.elementwise.residual(x, y, gate=gate), ahead=None)
        x, normed = self.elementwise.residual_norm(x, y, gate=gate, **following.norm(context))
        return replace(state, x=x, ahead=Ahead(x, state.text, following.index, None, (normed,)))

    def advance(
        self, x: torch.Tensor, normed: Any, context: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, Sum]:
        """The stream before its last residual, what that is to add, and with which gate."""
        _, _, gate, shift, scale, mlp_gate = self._vectors(context)
        y = self.attention(normed, context)
        if (norm := self.cross_norm) is None:
            x = normed = self.elementwise.residual(x, y, gate=gate)
        else:
            affine = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, **asks(self.cross.reader)}
            x, normed = self.elementwise.residual_norm(x, y, gate=gate, **affine)
        y = self.cross(normed, context)
        x, normed = self.elementwise.residual_norm(x, y, shift=shift, scale=scale, eps=self.eps, **asks(self.mlp.up))
        return x, self.mlp(normed, self.elementwise), mlp_gate

    def norm(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """The norm in front of self attention, as keywords of the arithmetic."""
        shift, scale = self._vectors(context)[:2]
        return {"shift": shift, "scale": scale, "eps": self.eps, **asks(self.attention.reader)}

    def _vectors(self, context: Mapping[str, Any]) -> list[Sum]:
        """Shift, scale and gate of self attention, then of the MLP."""
        return sums(context["modulation"], self.table)

    def _normed(self, state: State) -> Any:
        """The stream, normalised and modulated: ahead of time, unless it was changed since (by a cache)."""
        ahead = ahead_for(state, self.index)
        return ahead.normed[0] if ahead else self.elementwise.norm(state.x, **self.norm(state.context))


def sums(vectors: Sequence[torch.Tensor], table: torch.Tensor) -> list[Sum]:
    """Vectors of time, with the rows of a table that are to be added to them."""
    return [Sum(own, base) for own, base in zip(vectors, table.flatten(0, -2).unbind(), strict=True)]
