"""FLUX's two kinds of blocks: a stream each for text and picture that attend to each other, and one joint stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vivace.attention.backend import Attend
from vivace.family import State
from vivace.fused.elementwise import Elementwise
from vivace.fused.stack import Stack, takes

HALF = torch.finfo(torch.float16).max


class Ahead(NamedTuple):
    """What a block computed for the one after it, out of the streams `x` and `text`."""

    x: torch.Tensor
    text: torch.Tensor
    reader: int  # index of the block it is for
    joint: torch.Tensor | None  # [B, T + S, D], of which x and text are views
    normed: tuple[Any, ...]  # the streams, or the joint one, normalised and modulated for that block


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

    `spans` are the places of the image's and the text's modulation, `following` is the next double block.
    """

    def __init__(self, block: Any, *, index: int, spans: tuple[slice, slice], parts: Parts) -> None:
        attention = block.attn
        self.block, self.index, self.spans = block, index, spans
        self.following: DoubleBlock | None = None
        self.attend, self.elementwise = parts.attend, parts.elementwise
        self.image_qkv = Stack([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)
        self.text_qkv = Stack([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], undo=parts.undo)

    def __call__(self, state: State) -> State:
        block, modulation, control = self.block, state.context["modulation"], state.context["control"]
        x, text = state.x, state.text
        assert text is not None
        image_parts, text_parts = (modulation[span] for span in self.spans)
        image_normed, text_normed = self._normed(state, modulation)
        attended = self._attention(image_normed, text_normed, state.context)
        image_ahead, text_ahead = (None, None)
        if control is None and self.following is not None:
            image_ahead, text_ahead = self.following.norms(modulation)

        tokens = text.shape[1]
        y = block.attn.to_out[0](attended[:, tokens:])
        x, image_normed = self._stream(x, y, block.ff, image_parts, image_ahead)
        y = block.attn.to_add_out(attended[:, :tokens])
        text, text_normed = self._stream(text, y, block.ff_context, text_parts, text_ahead)
        text = clipped(text)
        if control is not None:
            x = x + control[self.index]
        ahead = image_ahead and Ahead(x, text, self.index + 1, None, (image_normed, text_normed))
        return replace(state, x=x, text=text, ahead=ahead)

    def norms(self, modulation: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
        """The first norm of image and text, as keywords of the arithmetic."""
        readers = zip(self.spans, (self.image_qkv, self.text_qkv), strict=True)
        return [
            {"shift": modulation[span][0], "scale": modulation[span][1], "quantize": takes(qkv)}
            for span, qkv in readers
        ]

    def _normed(self, state: State, modulation: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Both streams, normalised and modulated for attention."""
        ahead = ahead_for(state, self.index)
        if ahead is not None:
            return ahead.normed
        streams = zip((state.x, state.text), self.norms(modulation), strict=True)
        return tuple(self.elementwise.norm(x, **norm) for x, norm in streams)

    def _stream(self, x: torch.Tensor, y: torch.Tensor, mlp: Any, parts: Any, ahead: Any) -> tuple[torch.Tensor, Any]:
        """One stream after attention's share `y`: residual and MLP, and with `ahead` the next block's norm of it."""
        _, _, gate, shift, scale, mlp_gate = parts
        up, _, down = mlp.net
        x, normed = self.elementwise.residual_norm(x, y, gate=gate, shift=shift, scale=scale, quantize=takes(up.proj))
        y = down(self.elementwise.linear_gelu(up.proj, normed, quantize=takes(down)))
        if ahead is None:
            return self.elementwise.residual(x, y, gate=mlp_gate), None
        return self.elementwise.residual_norm(x, y, gate=mlp_gate, **ahead)

    def _attention(self, image_normed: Any, text_normed: Any, context: dict[str, Any]) -> torch.Tensor:
        """[B, T + S, D]: text first, as the positions are."""
        attention, cos, sin = self.block.attn, context["cos"], context["sin"]
        text, image = self.text_qkv(text_normed), self.image_qkv(image_normed)
        tokens = text.shape[1]
        q, k, v = (
            image.new_empty(len(image), tokens + image.shape[1], attention.heads, attention.head_dim) for _ in range(3)
        )
        for qkv, offset, end, norm_q, norm_k in (
            (text, 0, tokens, attention.norm_added_q, attention.norm_added_k),
            (image, tokens, None, attention.norm_q, attention.norm_k),
        ):
            self.elementwise.heads(
                qkv, q=q, k=k, v=v, q_weight=norm_q.weight, k_weight=norm_k.weight, eps=norm_q.eps,
                cos=cos[offset:end], sin=sin[offset:end], offset=offset,
            )  # fmt: skip
        return self.attend(q, k, v).flatten(2)


class SingleBlock:
    """The joint stream [B, T + S, D]: attention and MLP side by side, read from one norm, joined by one projection.

    `span` is the place of its modulation, `following` is the next single block.
    """

    def __init__(self, block: Any, *, index: int, first: int, span: slice, parts: Parts) -> None:
        attention = block.attn
        self.block, self.index, self.reader, self.span = block, index, first + index, span
        self.following: SingleBlock | None = None
        self.attend, self.elementwise = parts.attend, parts.elementwise
        # H200, 4608 rows: products of 9216 and 12288 columns run at 795 TFLOP/s, one of both together at 709, and the
        # second of two can apply the GELU itself.
        self.qkv = Stack([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)

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
        mlp = self.elementwise.linear_gelu(self.block.proj_mlp, normed)
        y = self._outward(self._attention(self.qkv(normed), state.context), mlp)

        tokens = state.text.shape[1]
        if control is not None or self.following is None:
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
        return {"shift": shift, "scale": scale, "quantize": takes(self.qkv, self.block.proj_mlp)}

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
        """The projection of both side by side."""
        projection, inner = self.block.proj_out, attended.shape[-1]
        if type(projection) is not torch.nn.Linear:
            return projection(torch.cat((attended, mlp), dim=-1))
        # A sum of two products, so that neither is copied into a joint tensor; H200: at 740 TFLOP/s, together at 684.
        y = F.linear(attended, projection.weight[:, :inner], projection.bias)
        y.flatten(0, 1).addmm_(mlp.flatten(0, 1), projection.weight[:, inner:].t())
        return y
