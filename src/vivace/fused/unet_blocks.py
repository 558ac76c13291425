"""The two halves of a Stable Diffusion UNet's blocks: residual blocks of convolutions, and transformers over pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import attended, projected
from vivace.fused.parts import Parts
from vivace.fused.stack import Stack, takes
from vivace.kernels.row import HeadScaled
from vivace.memory.here import here

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
        return self.elementwise.picture_norm(x, **_group_norm(norm), silu=silu, add=add)

    def join_norm(self, norm: Any, x: torch.Tensor, *, silu: bool, **parts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A GroupNorm module's work on `x` and the `parts` that join it, and what they join to."""
        return self.elementwise.join_norm(x, **_group_norm(norm), silu=silu, **parts)


def _group_norm(norm: Any) -> dict[str, Any]:
    return {"groups": norm.num_groups, "weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


class Unsummed(NamedTuple):
    """A picture that the norm which reads it will sum: `x + y + bias`."""

    x: torch.Tensor
    y: torch.Tensor
    bias: torch.Tensor | None


class ResidualBlock:
    """Norm, SiLU, convolution; the same again with the time embedding; and the sum with the input.

    `span` is the place of its time embedding [B, C], to which the bias of the first convolution has been added; None
    for a block without one. A block whose convolutions go over the frames of a video takes it as a tall picture
    [B, C, F, H W].
    """

    def __init__(self, block: Any, *, span: slice | None = None, parts: PictureParts) -> None:
        self.block, self.span, self.parts = block, span, parts

    def __call__(
        self, x: torch.Tensor, time: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` [B, C, H, W], with a `skip` whose channels come after its own."""
        x, y, bias = self.unsummed(x, time, skip)
        y = self.parts.elementwise.picture_sum(x, y, bias=bias)
        factor = self.block.output_scale_factor
        return y if factor == 1 else y / factor

    def unsummed(self, x: torch.Tensor, time: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> Unsummed:
        """The same, but for the sum."""
        with here(self.block):
            return self._unsummed(x, time, skip)

    def _unsummed(self, x: torch.Tensor, time: torch.Tensor | None, skip: torch.Tensor | None) -> Unsummed:
        block, parts = self.block, self.parts
        if skip is not None and skip.dtype != x.dtype:
            x, skip = torch.cat((x, skip), dim=1), None
        # Something from outside (a ControlNet, an adapter) may have joined in another order.
        x = x.contiguous(memory_format=parts.layout)
        if skip is None:
            normed = parts.norm(block.norm1, x, silu=True)
        else:
            normed, x = parts.join_norm(block.norm1, x, skip=skip.contiguous(memory_format=parts.layout), silu=True)
        y, bias = self._convolutions(normed, time)
        return Unsummed(x if block.conv_shortcut is None else _mixed(block.conv_shortcut, x), y, bias)

    def branch(self, x: torch.Tensor, time: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is to be added to the input, and the bias [C] that is still missing from it."""
        return self._convolutions(self.parts.norm(self.block.norm1, x, silu=True), time)

    def _convolutions(
        self, normed: torch.Tensor, time: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        block, parts = self.block, self.parts
        late = parts.elementwise.late_bias
        y, bias = _convolved(block.conv1, normed, parts, late=late or time is not None)
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

    def __call__(self, x: torch.Tensor | Unsummed, text: Any) -> torch.Tensor:
        """`x` [B, C, H, W]; `text` is for the layers."""
        with here(self.block):
            return self._transformed(x, text)

    def _transformed(self, x: torch.Tensor | Unsummed, text: Any) -> torch.Tensor:
        block, parts = self.block, self.parts
        joins = False
        if isinstance(x, Unsummed):
            joins = parts.layout is torch.channels_last
            joins = joins and adds_in_place(block.proj_out, x.x.dtype, parts.elementwise)
            after = block.proj_out.bias if joins else None
            normed, x = parts.join_norm(block.norm, x.x, y=x.y, y_bias=x.bias, after=after, silu=False)
        else:
            normed = parts.norm(block.norm, x, silu=False)
        tokens = self.layers(self._inward(normed), text)
        if joins:
            add_product(x.permute(0, 2, 3, 1), tokens, block.proj_out)
            return x
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
            with here(block.block):
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
        y, bias = self.attention.unbiased(normed, elementwise)
        x, normed = elementwise.residual_norm(x, y, y_bias=bias, **norm_of(block.norm2, block.attn2.to_q))
        y, bias = unbiased(block.attn2.to_out[0], self._cross_attention(normed, text), elementwise)
        down = block.ff.net[2]
        joins = following is None and adds_in_place(down, x.dtype, elementwise)
        after = down.bias if joins else None
        norm = norm_of(block.norm3, block.ff.net[0].proj)
        x, normed = elementwise.residual_norm(x, y, y_bias=bias, after=after, **norm)
        hidden = gated(block.ff, normed, elementwise)
        if joins:
            add_product(x, hidden, down)
            return x, None
        if following is None:
            return elementwise.residual(x, down(hidden)), None
        y, bias = unbiased(down, hidden, elementwise)
        return elementwise.residual_norm(x, y, y_bias=bias, **following.first_norm)

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
        return y

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
        y, dtype = self._attended(normed)
        return projected(self.attention.to_out[0], y, dtype=dtype)

    def unbiased(self, normed: Any, elementwise: Elementwise) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, and the bias that is left to be added."""
        (y, dtype), out = self._attended(normed), self.attention.to_out[0]
        if isinstance(y, HeadScaled):
            return projected(out, y, dtype=dtype), None
        return unbiased(out, y, elementwise)

    def _attended(self, normed: Any) -> tuple[torch.Tensor | HeadScaled, torch.dtype]:
        q, k, v = self.reader(normed).unflatten(-1, (3, self.attention.heads, -1)).unbind(2)
        return attended(self.attend, q, k, v), q.dtype


def gated_mlp(mlp: Any, normed: Any, elementwise: Elementwise) -> torch.Tensor:
    """A feed-forward module with a GEGLU."""
    return mlp.net[2](gated(mlp, normed, elementwise))


def gated(mlp: Any, normed: Any, elementwise: Elementwise) -> Any:
    """What the second linear of a feed-forward module with a GEGLU reads."""
    up, _, down = mlp.net
    return elementwise.glu(*up.proj(normed).chunk(2, dim=-1), kind="gelu", quantize=takes(down))


def unbiased(linear: Any, x: Any, elementwise: Elementwise) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The product of `x` and a linear, and its bias where what follows had better add it."""
    if elementwise.late_bias and type(linear) is torch.nn.Linear:
        return F.linear(x, linear.weight), linear.bias
    return linear(x), None


def adds_in_place(linear: Any, dtype: torch.dtype, elementwise: Elementwise) -> bool:
    """Whether the product of a linear, or a convolution of one pixel, is to be added to a stream where that lies.

    cuBLAS does so in its epilogue, but then adds no bias: the stream has to have it already.
    """
    plain = type(linear) in (torch.nn.Linear, torch.nn.Conv2d) and linear.weight.dtype == dtype
    return elementwise.late_bias and plain and not torch.is_grad_enabled()


def add_product(stream: torch.Tensor, x: torch.Tensor, linear: Any) -> None:
    """Adds to `stream` [..., D], which is contiguous, the product of `x` and the weight of `linear`."""
    rows = stream.view(-1, stream.shape[-1])
    rows.addmm_(x.reshape(len(rows), -1), linear.weight.flatten(1).t())


def norm_of(norm: Any, reader: Any) -> dict[str, Any]:
    """A LayerNorm module whose result `reader` takes, as keywords of the arithmetic."""
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "quantize": takes(reader)}
