"""The two halves of a Stable Diffusion UNet's blocks: residual blocks of convolutions, and transformers over pixels."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vivace.attention.backend import Attend
from vivace.fused.elementwise import Elementwise
from vivace.fused.stack import Stack, takes


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

    `span` is the place of its time embedding [B, C], to which the bias of the first convolution has been added; None
    for a block without one.
    """

    def __init__(self, block: Any, *, span: slice | None = None, parts: Parts) -> None:
        self.block, self.span, self.parts = block, span, parts

    def __call__(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        block, parts = self.block, self.parts
        # Something from outside (a ControlNet, an adapter) may have joined in another order.
        x = x.contiguous(memory_format=parts.layout)
        late = parts.elementwise.late_bias
        y, bias = _convolved(block.conv1, parts.norm(block.norm1, x, silu=True), parts, late=late or time is not None)
        if time is not None and self.span is not None:
            add = time[:, self.span]
            add = add if bias is not None else add - block.conv1.bias
        else:
            add = None if bias is None else bias.expand(len(y), -1)
        y = parts.norm(block.norm2, y, silu=True, add=add)
        y, bias = _convolved(block.conv2, y, parts, late=late)
        x = x if block.conv_shortcut is None else _mixed(block.conv_shortcut, x)
        y = parts.elementwise.picture_sum(x, y, bias=bias)
        return y if block.output_scale_factor == 1 else y / block.output_scale_factor


def _convolved(
    convolution: Any, x: torch.Tensor, parts: Parts, *, late: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The convolution of `x`, and the bias that is left to be added when that may come `late`."""
    if type(convolution) is torch.nn.Conv2d and late:
        bias = convolution.bias
        y = F.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)
    else:
        y, bias = convolution(x), None
    # Changes nothing but for tensors without values, whose convolution does not keep the order.
    return y.contiguous(memory_format=parts.layout), bias


def _mixed(convolution: Any, x: torch.Tensor) -> torch.Tensor:
    """A convolution of one pixel; a linear product, with its bias, where channels are innermost."""
    if type(convolution) is not torch.nn.Conv2d or not x.is_contiguous(memory_format=torch.channels_last):
        return convolution(x)
    rows = F.linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias)
    return rows.permute(0, 3, 1, 2)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """A picture [B, C, H, W] as [B, H W, C] with contiguous rows; a view where channels are innermost."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


class PixelTransformer:
    """Norm, projection, transformer blocks over the pixels [B, H W, D], projection, and the sum with the input."""

    def __init__(self, block: Any, *, spans: list[slice], parts: Parts) -> None:
        self.block, self.parts = block, parts
        self.blocks = [
            TransformerBlock(inner, span=span, parts=parts)
            for inner, span in zip(block.transformer_blocks, spans, strict=True)
        ]

    def __call__(self, x: torch.Tensor, text: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`x` [B, C, H, W]; `text` [B, T, sum] the keys and values of all cross attentions, then the pictures'."""
        block, parts = self.block, self.parts
        tokens = self._inward(parts.norm(block.norm, x, silu=False))
        normed = parts.elementwise.norm(tokens, **self.blocks[0].first_norm)
        for inner, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            tokens, normed = inner(tokens, normed, text, following)
        y = self._outward(tokens, x.shape[2:])
        return parts.elementwise.picture_sum(x, y.contiguous(memory_format=parts.layout))

    def _inward(self, picture: torch.Tensor) -> torch.Tensor:
        projection = self.block.proj_in
        if isinstance(projection, torch.nn.Conv2d):
            return _tokens(_mixed(projection, picture))
        return projection(_tokens(picture))

    def _outward(self, tokens: torch.Tensor, size: torch.Size) -> torch.Tensor:
        projection = self.block.proj_out
        linear = not isinstance(projection, torch.nn.Conv2d)
        picture = (projection(tokens) if linear else tokens).unflatten(1, size).permute(0, 3, 1, 2)
        return picture if linear else _mixed(projection, picture)


class TransformerBlock:
    """Self attention, cross attention and a gated MLP, each behind a LayerNorm that the residual before it computes.

    `span` is the place of its text keys and values.
    """

    def __init__(self, block: Any, *, span: slice, parts: Parts) -> None:
        self.block, self.span, self.parts = block, span, parts
        own = block.attn1
        self.qkv = Stack([own.to_q, own.to_k, own.to_v], undo=parts.undo)

    def __call__(
        self, x: torch.Tensor, normed: Any, text: tuple[torch.Tensor, ...], following: TransformerBlock | None
    ) -> tuple[torch.Tensor, Any]:
        """`x` [B, S, D] and its first norm; the next block's comes back with the new x, None after the last."""
        block, elementwise = self.block, self.parts.elementwise
        up, _, down = block.ff.net
        x, normed = elementwise.residual_norm(x, self._self_attention(normed), **_norm(block.norm2, block.attn2.to_q))
        y = self._cross_attention(normed, text)
        x, normed = elementwise.residual_norm(x, y, **_norm(block.norm3, up.proj))
        y = down(elementwise.glu(*up.proj(normed).chunk(2, dim=-1), kind="gelu", quantize=takes(down)))
        if following is None:
            return elementwise.residual(x, y), None
        return elementwise.residual_norm(x, y, **following.first_norm)

    @property
    def first_norm(self) -> dict[str, Any]:
        """The norm before self attention, as keywords of the arithmetic."""
        return _norm(self.block.norm1, self.qkv)

    def _self_attention(self, normed: Any) -> torch.Tensor:
        attention = self.block.attn1
        q, k, v = self.qkv(normed).unflatten(-1, (3, attention.heads, -1)).unbind(2)
        return attention.to_out[0](self.parts.attend(q, k, v).flatten(2))

    def _cross_attention(self, normed: Any, text: tuple[torch.Tensor, ...]) -> torch.Tensor:
        attention = self.block.attn2
        q = attention.to_q(normed).unflatten(-1, (attention.heads, -1))
        y = self._attended(q, text[0])
        # An IP-Adapter's pictures are attended to beside the text, each with its strength.
        for strength, picture in zip(getattr(attention.processor, "scale", ()), text[1:], strict=True):
            if strength:
                y = y + strength * self._attended(q, picture)
        return attention.to_out[0](y)

    def _attended(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """q [B, S, H, D] over the keys and values of this block in [B, T, sum] -> [B, S, H D]."""
        k, v = keys[..., self.span].unflatten(-1, (2, q.shape[2], -1)).unbind(2)
        return self.parts.attend(q, k, v).flatten(2)


def _norm(norm: Any, reader: Any) -> dict[str, Any]:
    """A LayerNorm module whose result `reader` takes, as keywords of the arithmetic."""
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "quantize": takes(reader)}
