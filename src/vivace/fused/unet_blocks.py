"""The two halves of a Stable Diffusion UNet's blocks: residual blocks of convolutions, and transformers over pixels."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vivace.attention.backend import Attend
from vivace.fused.elementwise import Elementwise
from vivace.fused.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every block is built with."""

    attend: Attend
    elementwise: Elementwise
    layout: torch.memory_format  # of pictures between blocks
    undo: ExitStack

    def norm(self, norm: Any, x: torch.Tensor, *, silu: bool, add: torch.Tensor | None = None) -> torch.Tensor:
        """A GroupNorm module's work on `x` [B, C, H, W] (plus `add` [B, C])."""
        return self.elementwise.picture_norm(
            x, groups=norm.num_groups, weight=norm.weight, bias=norm.bias, eps=norm.eps, silu=silu, add=add
        )


class ResidualBlock:
    """Norm, SiLU, convolution; the same again with the time embedding; and the sum with the input.

    `span` is the place of its time embedding [B, C], to which the bias of the first convolution has been added.
    """

    def __init__(self, block: Any, *, span: slice, parts: Parts) -> None:
        self.block, self.span, self.parts = block, span, parts

    def __call__(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        block, parts = self.block, self.parts
        # Something from outside (a ControlNet, an adapter) may have joined in another order.
        x = x.contiguous(memory_format=parts.layout)
        y = _convolved(block.conv1, parts.norm(block.norm1, x, silu=True), bias=False, layout=parts.layout)
        y = parts.norm(block.norm2, y, silu=True, add=time[:, self.span])
        late = parts.elementwise.late_bias
        y = _convolved(block.conv2, y, bias=not late, layout=parts.layout)
        x = x if block.conv_shortcut is None else _mixed(block.conv_shortcut, x)
        y = parts.elementwise.picture_sum(x, y, bias=block.conv2.bias if late else None)
        return y if block.output_scale_factor == 1 else y / block.output_scale_factor


def _convolved(convolution: Any, x: torch.Tensor, *, bias: bool, layout: torch.memory_format) -> torch.Tensor:
    y = F.conv2d(x, convolution.weight, convolution.bias if bias else None, convolution.stride, convolution.padding)
    # Changes nothing but for tensors without values, whose convolution does not keep the order.
    return y.contiguous(memory_format=layout)


def _mixed(convolution: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution of one pixel; a linear product, with its bias, where channels are innermost."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return convolution(x)
    rows = F.linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias)
    return rows.permute(0, 3, 1, 2)


class PixelTransformer:
    """Norm, projection, transformer blocks over the pixels [B, H W, D], projection, and the sum with the input."""

    def __init__(self, block: Any, *, spans: list[slice], parts: Parts) -> None:
        self.block, self.parts = block, parts
        self.blocks = [
            TransformerBlock(inner, span=span, parts=parts)
            for inner, span in zip(block.transformer_blocks, spans, strict=True)
        ]

    def __call__(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """`x` [B, C, H, W]; `text` [B, T, sum] the keys and values of all cross attentions."""
        block, parts = self.block, self.parts
        normed = parts.norm(block.norm, x, silu=False)
        # A view where channels are innermost.
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = F.linear(tokens, block.proj_in.weight.flatten(1), block.proj_in.bias)
        normed = _layer_norm(parts.elementwise, self.blocks[0].block.norm1, tokens)
        for inner, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            tokens, normed = inner(tokens, normed, text, following)
        y = F.linear(tokens, block.proj_out.weight.flatten(1), block.proj_out.bias)
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return parts.elementwise.picture_sum(x, y.contiguous(memory_format=parts.layout))


class TransformerBlock:
    """Self attention, cross attention and a gated MLP, each behind a LayerNorm that the residual before it computes.

    `span` is the place of its text keys and values.
    """

    def __init__(self, block: Any, *, span: slice, parts: Parts) -> None:
        self.block, self.span, self.parts = block, span, parts
        own = block.attn1
        self.qkv = Stack([own.to_q, own.to_k, own.to_v], undo=parts.undo)

    def __call__(
        self, x: torch.Tensor, normed: Any, text: torch.Tensor, following: TransformerBlock | None
    ) -> tuple[torch.Tensor, Any]:
        """`x` [B, S, D] and its first norm; the next block's comes back with the new x, None after the last."""
        block, elementwise = self.block, self.parts.elementwise
        x, normed = _joined(elementwise, x, self._self_attention(normed), block.norm2)
        x, normed = _joined(elementwise, x, self._cross_attention(normed, text), block.norm3)
        up, _, down = block.ff.net
        y = down(elementwise.geglu(up.proj(normed)))
        if following is None:
            return elementwise.residual(x, y), None
        return _joined(elementwise, x, y, following.block.norm1)

    def _self_attention(self, normed: torch.Tensor) -> torch.Tensor:
        attention = self.block.attn1
        q, k, v = self.qkv(normed).unflatten(-1, (3, attention.heads, -1)).unbind(2)
        return attention.to_out[0](self.parts.attend(q, k, v).flatten(2))

    def _cross_attention(self, normed: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        attention = self.block.attn2
        q = attention.to_q(normed).unflatten(-1, (attention.heads, -1))
        k, v = text[..., self.span].unflatten(-1, (2, attention.heads, -1)).unbind(2)
        return attention.to_out[0](self.parts.attend(q, k, v).flatten(2))


def _layer_norm(elementwise: Elementwise, norm: Any, x: torch.Tensor) -> torch.Tensor:
    return elementwise.norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def _joined(elementwise: Elementwise, x: torch.Tensor, y: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return elementwise.residual_norm(x, y, weight=norm.weight, bias=norm.bias, eps=norm.eps)
