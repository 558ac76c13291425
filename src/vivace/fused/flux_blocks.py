"""FLUX's two kinds of blocks: a stream each for text and picture that attend to each other, and one joint stream."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vivace.attention.backend import Attend
from vivace.family import State
from vivace.fused.elementwise import Elementwise
from vivace.fused.stack import Stack, beside

HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class Rule:
    """On GPUs of compute capability `sm`, up to `rows` rows, a single block's QKV and MLP products are one GEMM."""

    sm: tuple[int, int]
    rows: int


# H200, 4608 rows: one GEMM of 21504 columns runs at 709 TFLOP/s, one of 9216 and one of 12288 at 795, and the second
# can apply the GELU itself. The row is a guess for where their last wave of tiles costs more than that.
RULES: tuple[Rule, ...] = (Rule(sm=(9, 0), rows=1536),)


class Ahead(NamedTuple):
    """What a block computed for the one after it, out of the streams `x` and `text`."""

    x: torch.Tensor
    text: torch.Tensor
    reader: int  # index of the block it is for
    joint: torch.Tensor | None  # [B, T + S, D], of which x and text are views
    normed: tuple[torch.Tensor, ...]  # the streams, or the joint one, normalised and modulated for that block


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every block is built with."""

    attend: Attend
    elementwise: Elementwise
    undo: ExitStack


def ahead_for(state: State, reader: int) -> Ahead | None:
    """What was computed ahead for block `reader`, unless the streams were changed since (a cache, a ControlNet)."""
    ahead = state.ahead
    if ahead is None or ahead.reader != reader or ahead.x is not state.x or ahead.text is not state.text:
        return None
    return ahead


def clipped(x: torch.Tensor) -> torch.Tensor:
    """`x`, in float16 without infinities, as the stock blocks keep it."""
    return x.clamp_(-HALF, HALF) if x.dtype == torch.float16 else x


class DoubleBlock:
    """Image [B, S, D] and text [B, T, D] attend to each other and go through their own MLPs.

    `spans` are the places of the image's and the text's modulation, `following` those of the next double block.
    """

    def __init__(
        self, block: Any, *, index: int, spans: tuple[slice, slice], following: tuple[slice, slice] | None, parts: Parts
    ) -> None:
        attention = block.attn
        self.block, self.index, self.spans, self.following = block, index, spans, following
        self.attend, self.elementwise = parts.attend, parts.elementwise
        self.image_qkv = Stack([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)
        self.text_qkv = Stack([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], undo=parts.undo)

    def __call__(self, state: State) -> State:
        block, modulation, control = self.block, state.context["modulation"], state.context["control"]
        x, text = state.x, state.text
        assert text is not None
        image_parts, text_parts = (modulation[span] for span in self.spans)
        image_normed, text_normed = self._normed(state, image_parts, text_parts)
        attended = self._attention(image_normed, text_normed, state.context)
        ahead = None if control is not None or self.following is None else [modulation[s] for s in self.following]

        tokens = text.shape[1]
        x, x_normed = self._stream(
            x, block.attn.to_out[0](attended[:, tokens:]), block.ff, image_parts, ahead and ahead[0]
        )
        text, text_normed = self._stream(
            text, block.attn.to_add_out(attended[:, :tokens]), block.ff_context, text_parts, ahead and ahead[1]
        )
        text = clipped(text)
        if control is not None:
            x = x + control[self.index]
        done = ahead and Ahead(x, text, self.index + 1, None, (x_normed, text_normed))
        return replace(state, x=x, text=text, ahead=done)

    def _normed(self, state: State, image_parts: Any, text_parts: Any) -> tuple[torch.Tensor, ...]:
        """Both streams, normalised and modulated for attention."""
        ahead = ahead_for(state, self.index)
        if ahead is not None:
            return ahead.normed
        assert state.text is not None
        streams = ((state.x, image_parts), (state.text, text_parts))
        return tuple(self.elementwise.norm(x, shift=parts[0], scale=parts[1]) for x, parts in streams)

    def _stream(self, x: torch.Tensor, y: torch.Tensor, mlp: Any, parts: Any, ahead: Any) -> tuple[torch.Tensor, Any]:
        """One stream after attention's share `y`: residual and MLP, and with `ahead` the next block's norm of it."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = parts
        up, _, down = mlp.net
        x, normed = self.elementwise.residual_norm(x, y, gate=gate, shift=mlp_shift, scale=mlp_scale)
        if beside(up.proj):
            y = down(self.elementwise.gelu(up.proj(normed)))
        else:
            y = down(self.elementwise.linear_gelu(normed, up.proj.weight, up.proj.bias))
        if ahead is None:
            return self.elementwise.residual(x, y, gate=mlp_gate), None
        return self.elementwise.residual_norm(x, y, gate=mlp_gate, shift=ahead[0], scale=ahead[1])

    def _attention(self, image: torch.Tensor, text: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
        """[B, T + S, D]: text first, as the positions are."""
        attention = self.block.attn
        batch, tokens, _ = text.shape
        cos, sin = context["cos"], context["sin"]
        shape = (batch, tokens + image.shape[1], attention.heads, attention.head_dim)
        q, k, v = (torch.empty(shape, device=image.device, dtype=image.dtype) for _ in range(3))
        for x, qkv, offset, end, norm_q, norm_k in (
            (text, self.text_qkv, 0, tokens, attention.norm_added_q, attention.norm_added_k),
            (image, self.image_qkv, tokens, None, attention.norm_q, attention.norm_k),
        ):
            self.elementwise.heads(
                qkv(x), q=q, k=k, v=v, q_weight=norm_q.weight, k_weight=norm_k.weight, eps=norm_q.eps,
                cos=cos[offset:end], sin=sin[offset:end], offset=offset,
            )  # fmt: skip
        return self.attend(q, k, v).flatten(2)


class SingleBlock:
    """The joint stream [B, T + S, D]: attention and MLP side by side, read from one norm, joined by one projection.

    `span` is the place of its modulation, `following` that of the next single block.
    """

    def __init__(
        self, block: Any, *, index: int, first: int, span: slice, following: slice | None, parts: Parts
    ) -> None:
        attention = block.attn
        self.block, self.index, self.reader, self.span, self.following = block, index, first + index, span, following
        self.attend, self.elementwise = parts.attend, parts.elementwise
        # One weight either way: its first rows are the QKV product, its last the MLP's.
        self.inward = Stack([attention.to_q, attention.to_k, attention.to_v, block.proj_mlp], undo=parts.undo)
        device = self.inward.weight.device
        sm = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self.wide_rows = next((rule.rows for rule in RULES if rule.sm == sm), 0)

    def __call__(self, state: State) -> State:
        assert state.text is not None
        modulation, control = state.context["modulation"], state.context["single_control"]
        shift, scale, gate = modulation[self.span]
        ahead = ahead_for(state, self.reader)
        if ahead is not None and ahead.joint is not None:
            joint, (normed,) = ahead.joint, ahead.normed
        else:
            joint = torch.cat((state.text, state.x), dim=1)
            normed = self.elementwise.norm(joint, shift=shift, scale=scale)
        qkv, mlp = self._inward(normed)
        y = self._outward(self._attention(qkv, state.context), mlp)

        tokens = state.text.shape[1]
        if control is not None or self.following is None:
            joint = clipped(self.elementwise.residual(joint, y, gate=gate))
            text, x = joint[:, :tokens], joint[:, tokens:]
            return replace(state, x=x if control is None else x + control[self.index], text=text, ahead=None)
        shift, scale, _ = modulation[self.following]
        joint, normed = self.elementwise.residual_norm(joint, y, gate=gate, shift=shift, scale=scale)
        joint = clipped(joint)
        text, x = joint[:, :tokens], joint[:, tokens:]
        return replace(state, x=x, text=text, ahead=Ahead(x, text, self.reader + 1, joint, (normed,)))

    def _inward(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [B, L, 3 D] of q, k and v, and the MLP's after its GELU."""
        weight, bias = self.inward.weight, self.inward.bias
        assert bias is not None
        rows = 3 * normed.shape[-1]
        if normed.shape[0] * normed.shape[1] > self.wide_rows and not beside(*self.inward.linears):
            mlp = self.elementwise.linear_gelu(normed, weight[rows:], bias[rows:])
            return F.linear(normed, weight[:rows], bias[:rows]), mlp
        both = self.inward(normed)
        return both[..., :rows], self.elementwise.gelu(both[..., rows:])

    def _attention(self, qkv: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
        attention = self.block.attn
        heads = qkv.unflatten(-1, (3, attention.heads, attention.head_dim))
        q, k = (torch.empty(heads.shape[:2] + heads.shape[3:], device=qkv.device, dtype=qkv.dtype) for _ in range(2))
        self.elementwise.heads(
            qkv, q=q, k=k, q_weight=attention.norm_q.weight, k_weight=attention.norm_k.weight,
            eps=attention.norm_q.eps, cos=context["cos"], sin=context["sin"],
        )  # fmt: skip
        return self.attend(q, k, heads[:, :, 2]).flatten(2)

    def _outward(self, attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
        """The projection of both side by side, as a sum of two products: neither is copied into a joint tensor."""
        projection, inner = self.block.proj_out, attended.shape[-1]
        if beside(projection):
            return projection(torch.cat((attended, mlp), dim=-1))
        y = F.linear(attended, projection.weight[:, :inner], projection.bias)
        y.flatten(0, 1).addmm_(mlp.flatten(0, 1), projection.weight[:, inner:].t())
        return y
