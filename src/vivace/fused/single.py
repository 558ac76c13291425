"""Single blocks: one joint stream, with attention and MLP side by side (ViT-22B, arXiv 2302.05442)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from vivace.family import State
from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import Heads, attend_alone, heads_for
from vivace.fused.joint import Ahead, ahead_for, clipped
from vivace.fused.modulation import reaches
from vivace.fused.parts import Parts
from vivace.fused.stack import Stack, asks, filled, takes
from vivace.kernels.row import HeadScaled
from vivace.kernels.unscale_heads import unscale_heads
from vivace.lora.outward import outward
from vivace.lora.side import plain, side_of


class Inward(Protocol):
    """The products into a single block."""

    @property
    def kind(self) -> str:
        """The MLP's activation."""
        ...

    @property
    def asks(self) -> dict[str, Any]:
        """What the norm in front is to make, as its keywords."""
        ...

    def __call__(self, normed: Any, *, activate: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k and v `[B, S, 3 D]`; the MLP's rows, activated or still to be; what then multiplies them (None: one)."""
        ...


@dataclass(frozen=True, kw_only=True)
class TwoProducts:
    """q, k and v in one product, the MLP in another (FLUX.1).

    H200, 4608 rows: products of 9216 and 12288 columns run at 795 TFLOP/s, one of both together at 709, and the second
    of two can apply the GELU itself.
    """

    qkv: Stack
    up: Any
    elementwise: Elementwise
    kind: str = "gelu_tanh"

    @property
    def asks(self) -> dict[str, Any]:
        return asks(self.up, self.qkv)

    def __call__(self, normed: Any, *, activate: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        normed = filled(normed, self.qkv)
        rows = self.elementwise.linear_gelu(self.up, normed) if activate else self.up(normed)
        return self.qkv(normed), rows, None


@dataclass(frozen=True, kw_only=True)
class OneProduct:
    """q, k, v and a SwiGLU's two halves in the one product that the model has for them (FLUX.2)."""

    linear: Any
    width: int  # of the stream
    elementwise: Elementwise
    kind: str = "silu"

    @property
    def asks(self) -> dict[str, Any]:
        return asks(self.linear)

    def __call__(self, normed: Any, *, activate: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        rows = self.linear(normed)
        gate, y = rows[..., 3 * self.width :].chunk(2, dim=-1)
        qkv = rows[..., : 3 * self.width]
        return (qkv, self.elementwise.glu(y, gate, kind=self.kind), None) if activate else (qkv, gate, y)


class SingleBlock:
    """The joint stream [B, T + S, D]: attention and MLP read from one norm, joined by one projection.

    `span` is the place of its modulation, `first` the number of blocks before the first of its kind, `following` the
    next single block.
    """

    def __init__(
        self, inward: Inward, out: Any, *, heads: Heads, index: int, first: int, span: slice, parts: Parts
    ) -> None:
        self.inward, self.out, self.adapted = inward, out, outward(out, undo=parts.undo)
        (self.heads,) = heads_for(parts.attend, heads)
        self.index, self.reader, self.span = index, first + index, span
        self.attend, self.elementwise = parts.attend, parts.elementwise
        self.following: SingleBlock | None = None

    def __call__(self, state: State) -> State:
        assert state.text is not None
        modulation, control = state.context["modulation"], state.context["single_control"]
        gate = modulation[self.span][2]
        ahead = ahead_for(state, self.reader)
        if ahead is not None and ahead.joint is not None:
            joint, (normed,) = ahead.joint, ahead.normed
        else:
            joint = torch.cat((state.text, state.x), dim=1)
            normed = self.elementwise.norm(joint, **self.norm(modulation))
        y = self._branch(normed, state.context)

        tokens = state.text.shape[1]
        if control is not None or self.following is None or not reaches(modulation, self.following.span):
            joint = clipped(self.elementwise.residual(joint, y, gate=gate))
            text, x = joint[:, :tokens], joint[:, tokens:]
            return replace(state, x=x if control is None else x + control[self.index], text=text, ahead=None)
        joint, normed = self.elementwise.residual_norm(joint, y, gate=gate, **self.following.norm(modulation))
        joint = clipped(joint)
        text, x = joint[:, :tokens], joint[:, tokens:]
        return replace(state, x=x, text=text, ahead=Ahead(x, text, self.reader + 1, joint, (normed,)))

    def norm(self, modulation: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Its norm, as keywords of the arithmetic."""
        shift, scale, _ = modulation[self.span]
        return {"shift": shift, "scale": scale, **self.inward.asks}

    def _branch(self, normed: Any, context: dict[str, Any]) -> torch.Tensor:
        """Attention and MLP [B, T + S, D], projected without ever lying side by side where that can be."""
        # Adapters that could not lie behind its rows read both inputs side by side.
        reads = plain(self.out) and (self.adapted is not None or side_of(self.out) is None)
        qkv, mlp, times = self.inward(normed, activate=reads)
        attended = attend_alone(qkv, self.heads, context["tokens"], attend=self.attend, elementwise=self.elementwise)
        if not reads:
            kind = self.inward.kind
            return self.out(self.elementwise.join(attended, mlp, times=times, kind=kind, quantize=takes(self.out)))
        if isinstance(attended, HeadScaled):
            attended = unscale_heads(attended, dtype=qkv.dtype)
            assert isinstance(attended, torch.Tensor)
        if self.adapted is not None:
            return self.adapted(attended, mlp)
        # A sum of two products, so that neither is copied into a joint tensor; H200: at 740 TFLOP/s, together at 684.
        inner, weight = attended.shape[-1], self.out.weight
        y = F.linear(attended, weight[:, :inner], self.out.bias)
        y.flatten(0, 1).addmm_(mlp.flatten(0, 1), weight[:, inner:].t())
        return y
