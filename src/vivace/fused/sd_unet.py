"""The UNet of Stable Diffusion, SDXL and LCM, fused.

Keys and values of the text are computed once per prompt, the time embeddings of all residual blocks in one GEMM a step,
and so are the keys and values of an IP-Adapter's pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.torch_utils import apply_freeu

from vivace.families.unet import join_control, split
from vivace.family import Block, Split, State
from vivace.fused.contract import Fused
from vivace.fused.parts import Parts
from vivace.fused.stack import Stack
from vivace.fused.unet_blocks import (
    PictureParts,
    PixelTransformer,
    ResidualBlock,
    TransformerBlock,
    TransformerBlocks,
    Unsummed,
    odd_attention,
)
from vivace.memory.joined import join
from vivace.one_off import stock_class
from vivace.quant.linear import QuantLinear

BLOCKS = (
    CrossAttnDownBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    CrossAttnUpBlock2D,
    UpBlock2D,
)
"""Blocks that are residual blocks and pixel transformers in turn."""

PLAIN: Mapping[type, Mapping[str, Any]] = {
    ResnetBlock2D: {"time_embedding_norm": "default", "skip_time_act": False, "upsample": None, "downsample": None},
    Transformer2DModel: {"is_input_continuous": True},
    BasicTransformerBlock: {
        "norm_type": "layer_norm",
        "only_cross_attention": False,
        "double_self_attention": False,
        "pos_embed": None,
        "_chunk_size": None,
    },
}
"""Attributes of the modules inside, and the values with which they are what is fused here."""


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    projection = denoiser.encoder_hid_proj
    if projection is not None and type(projection) is not MultiIPAdapterImageProjection:
        return f"its text goes through a {type(projection).__name__}"
    if getattr(denoiser, "text_encoder_hid_proj", None) is not None:
        return f"its text goes through a {type(denoiser.text_encoder_hid_proj).__name__}"
    if not isinstance(denoiser.config.cross_attention_dim, int):
        return "its blocks read texts of different widths"
    if len({isinstance(linear, QuantLinear) for linear in _text_linears(denoiser)}) > 1:
        return "its text keys and values are quantised in part"
    for name, block in levels_of(denoiser):
        if stock_class(type(block)) not in BLOCKS:
            return f"{name} is a {type(block).__name__}"
        for kind, inner in (*((ResnetBlock2D, r) for r in block.resnets), *_transformers(block)):
            if stock_class(type(inner)) is not kind:
                return f"{name} holds a {type(inner).__name__}"
            for attribute, plain in PLAIN[kind].items():
                if getattr(inner, attribute) != plain:
                    return f"a {kind.__name__} of {name} has {attribute}={getattr(inner, attribute)!r}"
            if (reason := _odd(inner)) is not None:
                return f"a {kind.__name__} of {name} has {reason}"
    return None


def _odd(module: Any) -> str | None:
    """What in a residual or transformer block is not as it is fused here, or None."""
    if isinstance(module, ResnetBlock2D):
        if module.time_emb_proj is None:
            return "no time embedding"
        if not isinstance(module.nonlinearity, torch.nn.SiLU):
            return f"a {type(module.nonlinearity).__name__} for its activation"
        return "dropout" if module.training and module.dropout.p else None
    if not isinstance(module, BasicTransformerBlock):
        return None
    if module.attn2 is None or not isinstance(module.ff.net[0], GEGLU):
        return "no cross attention or no GEGLU"
    reason = odd_attention(module.attn1) or odd_attention(module.attn2, also=(IPAdapterAttnProcessor2_0,))
    if reason is not None:
        return reason
    if any(isinstance(scale, list) for scale in getattr(module.attn2.processor, "scale", ())):
        return "an IP-Adapter with a strength for each picture"
    return "dropout" if module.training and module.dropout else None


def declines(
    *,
    attention_mask: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    cross_attention_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> str | None:
    """Why one call must take the stock path, or None."""
    brings = {name for name, value in (cross_attention_kwargs or {}).items() if name != "scale" and value is not None}
    masks = {"attention_mask": attention_mask, "encoder_attention_mask": encoder_attention_mask}
    brings |= {name for name, mask in masks.items() if mask is not None}
    return f"the call brings {', '.join(sorted(brings))}" if brings else None


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a UNet2DConditionModel."""
    pictures = PictureParts(**vars(parts), layout=layout_of(denoiser))
    builder = Builder(denoiser, pictures)
    levels = [(name, block, builder.level(block)) for name, block in levels_of(denoiser)]
    return Split(
        prologue=partial(_prologue, split(denoiser).prologue, builder.time(), builder.pictures()),
        blocks=tuple(step_of(name, block, level, denoiser) for name, block, level in levels),
        epilogue=partial(_epilogue, denoiser, pictures),
        once=builder.once(),
        once_inputs=("encoder_hidden_states",),
    )


def layout_of(denoiser: Any) -> torch.memory_format:
    """The order of pixels between blocks: that of the weights."""
    weight = denoiser.conv_in.weight
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def levels_of(denoiser: Any) -> Iterator[tuple[str, Any]]:
    """The down, mid and up blocks of a UNet, by name."""
    yield from ((f"down_blocks.{i}", block) for i, block in enumerate(denoiser.down_blocks))
    if denoiser.mid_block is not None:
        yield "mid_block", denoiser.mid_block
    yield from ((f"up_blocks.{i}", block) for i, block in enumerate(denoiser.up_blocks))


def _attentions(block: Any) -> list[Any]:
    return [inner for inner in getattr(block, "attentions", ()) if inner is not None]


def _transformers(block: Any) -> Iterator[tuple[type, Any]]:
    for outer in _attentions(block):
        yield Transformer2DModel, outer
        if isinstance(outer, Transformer2DModel):
            yield from ((BasicTransformerBlock, inner) for inner in outer.transformer_blocks)


def _text_linears(denoiser: Any) -> Iterator[Any]:
    """What makes keys and values of the text, wherever that is."""
    yield from (module for name, module in denoiser.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v")))


def _outside(denoiser: Any) -> Iterator[Any]:
    """What makes time embeddings, and keys and values of text and an IP-Adapter's pictures."""
    ends = (".time_emb_proj", ".attn2.to_k", ".attn2.to_v", ".attn2.processor")
    yield from (module for name, module in denoiser.named_modules() if name.endswith(ends))


Residual = Callable[..., torch.Tensor | Unsummed]
"""`(x, time, skip)`: a residual block."""

Level = list[tuple[Residual, PixelTransformer | None]]
"""A UNet block: residual blocks, each with the transformer that follows it."""


class Builder:
    """Builds the levels of a UNet, and gathers what all of them share: time embeddings, and keys and values of text."""

    def __init__(self, denoiser: Any, parts: PictureParts) -> None:
        self.parts = parts
        self._residuals: list[Any] = []
        self._times = self._texts = 0  # columns so far
        self._keys: list[torch.nn.Linear] = []
        self._picture_keys: list[list[Any]] = []  # of every IP-Adapter

    def level(self, block: Any) -> Level:
        attentions = [self.transformer(inner) for inner in _attentions(block)]
        attentions += [None] * (len(block.resnets) - len(attentions))
        pairs = zip(block.resnets, attentions, strict=True)
        return [(self.residual(inner, summed=after is None), after) for inner, after in pairs]

    def residual(self, block: Any, *, summed: bool) -> Residual:
        """A residual block; what follows one that is not `summed` does that itself."""
        embedded = self.embedded(block)
        return embedded if summed or block.output_scale_factor != 1 else embedded.unsummed

    def embedded(self, block: Any) -> ResidualBlock:
        """A residual block with a place for its time embedding."""
        span = slice(self._times, self._times + block.out_channels)
        self._times = span.stop
        self._residuals.append(block)
        return ResidualBlock(block, span=span, parts=self.parts)

    def transformer(self, block: Any) -> PixelTransformer:
        blocks = []
        for inner in block.transformer_blocks:
            linears = [inner.attn2.to_k, inner.attn2.to_v]
            span = slice(self._texts, self._texts + sum(linear.out_features for linear in linears))
            self._texts = span.stop
            self._keys += linears
            processor = inner.attn2.processor
            if isinstance(processor, IPAdapterAttnProcessor2_0):
                pairs = [list(pair) for pair in zip(processor.to_k_ip, processor.to_v_ip, strict=True)]
                before = self._picture_keys or [[] for _ in pairs]
                self._picture_keys = [keys + pair for keys, pair in zip(before, pairs, strict=True)]
            blocks.append(TransformerBlock(inner, span=span, parts=self.parts))
        return PixelTransformer(block, layers=TransformerBlocks(blocks, parts=self.parts), parts=self.parts)

    def time(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """All time embeddings [B, sum], with the biases of the convolutions that they are added to."""
        undo = self.parts.undo
        stack = Stack([block.time_emb_proj for block in self._residuals], undo=undo)
        biases = join([block.conv1.bias for block in self._residuals], undo)
        return lambda embedding: stack(F.silu(embedding)) + biases

    def once(self) -> Callable[..., Mapping[str, torch.Tensor | None]]:
        """Keys and values of all cross attentions [B, T, sum], from the text [B, T, D]."""
        stack = Stack(self._keys, undo=self.parts.undo) if self._keys else None
        return lambda encoder_hidden_states: {"text": stack and stack(encoder_hidden_states)}

    def pictures(self) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
        """Keys and values of all cross attentions [B, T, sum] for each IP-Adapter, from its [B, pictures, T, D]."""
        stacks = [Stack(keys, undo=self.parts.undo) for keys in self._picture_keys]
        return lambda tokens: tuple(stack(one.flatten(1, 2)) for stack, one in zip(stacks, tokens, strict=True))


def step_of(name: str, module: Any, level: Level, denoiser: Any) -> Block:
    """One level of a UNet as a step on a state."""
    kind, _, place = name.partition(".")
    if kind == "down_blocks":
        forward = partial(_down, module, level, int(place))
    elif kind == "mid_block":
        forward = partial(_mid, level, len(denoiser.down_blocks))
    else:
        forward = partial(_up, module, level, int(place), len(denoiser.up_blocks) - 1)
    return Block(name=name, module=module, forward=forward)


def _run(
    pair: tuple[Residual, PixelTransformer | None],
    x: torch.Tensor,
    context: Mapping[str, Any],
    skip: torch.Tensor | None = None,
) -> Any:
    residual, transformer = pair
    made = residual(x, context["time"], skip)
    return made if transformer is None else transformer(made, context["text"])


def _down(block: Any, level: Level, index: int, state: State) -> State:
    context, x, skips = state.context, state.x, []
    adapter = context["adapter"][index] if index < len(context["adapter"]) else None
    for pair in level:
        x = _run(pair, x, context)
        skips.append(x)
    if adapter is not None and level[-1][1] is not None:
        x = skips[-1] = x + adapter
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        skips.append(x)
    if adapter is not None and level[-1][1] is None:
        x = skips[-1] = x + adapter
    return replace(state, x=x, skips=(*state.skips, *skips))


def _mid(level: Level, index: int, state: State) -> State:
    x, rest = state.x, state.context["adapter"][index:]
    for pair in level:
        x = _run(pair, x, state.context)
    if rest and rest[0].shape == x.shape:
        x = x + rest[0]
    return replace(state, x=x)


def _up(block: Any, level: Level, index: int, last: int, state: State) -> State:
    context = state.context
    if context["control"] is not None:
        state = join_control(state)
    x, skips, own = state.x, state.skips[: -len(level)], state.skips[-len(level) :]
    strengths = {name: getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")}
    for pair, skip in zip(level, reversed(own), strict=True):
        if all(strengths.values()):
            x, skip = apply_freeu(block.resolution_idx, x, skip, **strengths)
        x = _run(pair, x, context, skip)
    size = skips[-1].shape[2:] if context["odd_size"] and index != last else None
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return replace(state, x=x, skips=skips)


def _prologue(
    stock: Callable[..., State],
    time: Callable[[torch.Tensor], torch.Tensor],
    pictures: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]],
    *,
    once: Mapping[str, torch.Tensor],
    **kwargs: Any,
) -> State:
    state = stock(**kwargs)
    text = state.context["attention"]["encoder_hidden_states"]
    shown = pictures(text[1]) if isinstance(text, tuple) else ()
    context = {**state.context, "time": time(state.context["emb"]), "text": (once["text"], *shown)}
    return replace(state, context=context)


def _epilogue(denoiser: Any, parts: PictureParts, state: State) -> Any:
    x = state.x
    if denoiser.conv_norm_out is not None:
        silu = isinstance(denoiser.conv_act, torch.nn.SiLU)
        x = parts.norm(denoiser.conv_norm_out, x, silu=silu)
        x = x if silu else denoiser.conv_act(x)
    x = denoiser.conv_out(x)
    return UNet2DConditionOutput(sample=x) if state.context["return_dict"] else (x,)


SD_UNET = Fused(
    summary="text keys and values once per prompt, time embeddings of all blocks in one GEMM, q k v in one, "
    "residuals with the norms that follow",
    check=check,
    declines=declines,
    build=build,
    outside=_outside,
)
