"""The two halves of a Stable Diffusion UNet's blocks: residual blocks of convolutions, and transformers over pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import attended, projected
from vivace.fused.parts import Parts
from vivace.fused.stack import Stack, takes

ATTENTION: Mapping[str, Any] = {
    "spatial_norm": None,
    "group_norm": None,
    "norm_cross": None,
    "norm_q": None,
    "norm_k": None,
    "residual_connection": False,
    "rescale_output_factor": 1.0,
}
"""Attributes of an attention, and the values with which it is what is fused here."""


def odd_attention(attention: Any, *, also: tuple[type, ...] = ()) -> str | None:
    """What in an attention is not as it is fused here, or None; `also` are more processors that are."""
    if type(attention.processor) not in (AttnProcessor2_0, *also):
        return f"a {type(attention.processor).__name__}"
    if attention.fused_projections:
        return "projections fused by diffusers"
    odd = next((name for name, plain in ATTENTION.items() if getattr(attention, name) != plain), None)
    return odd and f"an attention with {odd}={getattr(attention, odd)!r}"


@dataclass(frozen=True, kw_only=True)
class PictureParts(Parts):
    """What blocks of pictures are built with."""

    layout: torch.memory_format  # of pictures between blocks

    def norm(self, norm: Any, x: torch.Tensor, *, silu: bool, add: torch.Tensor | None = None) -> torch.Tensor:
        """A GroupNorm module's work on `x` [B, C, H, W] (plus `add` [B, C])."""
        return self.elementwise.picture_norm(
            x, groups=norm.num_groups, weight=norm.weight, bias=norm.bias, eps=norm.eps, silu=silu, add=add
        )


class ResidualBlock:
    """Norm, SiLU, convolution; the same again with the time embedding; and the sum with the input.

    `span` is the place of its time embedding [B, C], to which the bias of the first convolution has been added; None
    for a block without one. A block whose convolutions go over the frames of a video takes it as a tall picture
    [B, C, F, H W].
    """

    def __init__(self, block: Any, *, span: slice | None = None, parts: PictureParts) -> None:
        self.block, self.span, self.parts = block, span, parts

    def __call__(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        block = self.block
        # Something from outside (a ControlNet, an adapter) may have joined in another order.
        x = x.contiguous(memory_format=self.parts.layout)
        y, bias = self.branch(x, time)
        x = x if block.conv_shortcut is None else _mixed(block.conv_shortcut, x)
        y = self.parts.elementwise.picture_sum(x, y, bias=bias)
        return y if block.output_scale_factor == 1 else y / block.output_scale_factor

    def branch(self, x: torch.Tensor, time: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is to be added to the input, and the bias [C] that is still missing from it."""
        block, parts = self.block, self.parts
        late = parts.elementwise.late_bias
        y, bias = _convolved(block.conv1, parts.norm(block.norm1, x, silu=True), parts, late=late or time is not None)
        if time is not None and self.span is not None:
            add = time[:, self.span]
            add = add if bias is not None else add - block.conv1.bias
        else:
            add = None if bias is None else bias.expand(len(y), -1)
        y = parts.norm(block.norm2, y, silu=True, add=add)
        return _convolved(block.conv2, y, parts, late=late)


def _convolved(
    convolution: Any, x: torch.Tensor, parts: PictureParts, *, late: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The convolution of `x`, and the bias that is left to be added when that may come `late`."""
    over_frames = type(convolution) is torch.nn.Conv3d and convolution.kernel_size[1:] == (1, 1)
    if over_frames or (type(convolution) is torch.nn.Conv2d and late):
        weight, bias = convolution.weight.squeeze(-1) if over_frames else convolution.weight, convolution.bias
        stride, padding = convolution.stride[:2], convolution.padding[:2]
        y, bias = F.conv2d(x, weight, None if late else bias, stride, padding), bias if late else None
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
    """Norm, projection, `layers` over the pixels [B, H W, D], projection, and the sum with the input."""

    def __init__(self, block: Any, *, layers: Callable[[torch.Tensor, Any], torch.Tensor], parts: PictureParts) -> None:
        self.block, self.layers, self.parts = block, layers, parts

    def __call__(self, x: torch.Tensor, text: Any) -> torch.Tensor:
        """`x` [B, C, H, W]; `text` is for the layers."""
        block, parts = self.block, self.parts
        tokens = self.layers(self._inward(parts.norm(block.norm, x, silu=False)), text)
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


class TransformerBlocks:
    """Blocks one after the other, each of which computes the norm that the next one starts with."""

    def __init__(self, blocks: Sequence[TransformerBlock], *, parts: PictureParts) -> None:
        self.blocks, self.parts = blocks, parts

    def __call__(self, tokens: torch.Tensor, text: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`tokens` [B, S, D]; `text` [B, T, sum] the keys and values of all cross attentions, then the pictures'."""
        normed = self.parts.elementwise.norm(tokens, **self.blocks[0].first_norm)
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            tokens, normed = block(tokens, normed, text, following)
        return tokens


class TransformerBlock:
    """Self attention, cross attention and a gated MLP, each behind a LayerNorm that the residual before it computes.

    `span` is the place of its text keys and values.
    """

    def __init__(self, block: Any, *, span: slice, parts: PictureParts) -> None:
        self.block, self.span, self.parts = block, span, parts
        self.attention = SelfAttention(block.attn1, parts=parts)

    def __call__(
        self, x: torch.Tensor, normed: Any, text: tuple[torch.Tensor, ...], following: TransformerBlock | None
    ) -> tuple[torch.Tensor, Any]:
        """`x` [B, S, D] and its first norm; the next block's comes back with the new x, None after the last."""
        block, elementwise = self.block, self.parts.elementwise
        y = self.attention(normed)
        x, normed = elementwise.residual_norm(x, y, **norm_of(block.norm2, block.attn2.to_q))
        y = self._cross_attention(normed, text)
        x, normed = elementwise.residual_norm(x, y, **norm_of(block.norm3, block.ff.net[0].proj))
        y = gated_mlp(block.ff, normed, elementwise)
        if following is None:
            return elementwise.residual(x, y), None
        return elementwise.residual_norm(x, y, **following.first_norm)

    @property
    def first_norm(self) -> dict[str, Any]:
        """The norm before self attention, as keywords of the arithmetic."""
        return norm_of(self.block.norm1, self.attention.reader)

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


class SelfAttention:
    """The attention of pixels [B, S, D] to each other; `reader` reads them."""

    def __init__(self, attention: Any, *, parts: Parts) -> None:
        self.attention, self.attend = attention, parts.attend
        self.reader = Stack([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)

    def __call__(self, normed: Any) -> torch.Tensor:
        q, k, v = self.reader(normed).unflatten(-1, (3, self.attention.heads, -1)).unbind(2)
        return projected(self.attention.to_out[0], attended(self.attend, q, k, v), dtype=q.dtype)


def gated_mlp(mlp: Any, normed: Any, elementwise: Elementwise) -> torch.Tensor:
    """A feed-forward module with a GEGLU."""
    up, _, down = mlp.net
    return down(elementwise.glu(*up.proj(normed).chunk(2, dim=-1), kind="gelu", quantize=takes(down)))


def norm_of(norm: Any, reader: Any) -> dict[str, Any]:
    """A LayerNorm module whose result `reader` takes, as keywords of the arithmetic."""
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "quantize": takes(reader)}
