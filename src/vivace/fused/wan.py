"""Wan's denoiser, fused: text to video, picture to video, and a time for every position.

Keys and values of text and picture are computed once per prompt; each residual normalises and modulates for what comes
next; queries and keys are normalised across their heads and rotated in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial, reduce
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from vivace.families.wan import grid, video_of
from vivace.family import Split, State
from vivace.fused.contract import Fused, brings, foreign_attention
from vivace.fused.cross_blocks import CrossBlock, sums
from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import Heads, Tokens, attend_alone, heads_for, projected
from vivace.fused.joint import chained
from vivace.fused.parts import Parts
from vivace.fused.stack import readers

ENCODED_TOKENS = 512
"""What is in front of this many tokens of the text belongs to a picture, where the model reads one."""


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    blocks = {
        f"{name}.{index}": block
        for name in ("vace_blocks", "blocks")
        for index, block in enumerate(getattr(denoiser, name, ()))
    }
    if (name := next((n for n, b in blocks.items() if not isinstance(b.norm2, FP32LayerNorm)), None)) is not None:
        return f"{name} has no norm before its cross attention"
    attentions = ((name, attention) for name, block in blocks.items() for attention in (block.attn1, block.attn2))
    return foreign_attention(attentions, known=(WanAttnProcessor,))


def declines(*, attention_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    return brings(attention_kwargs)


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a WanTransformer3DModel."""
    blocks = [video_block(block, index=i, parts=parts) for i, block in enumerate(denoiser.blocks)]
    return Split(
        prologue=partial(prologue, denoiser),
        signal=_signal,
        blocks=chained("blocks", denoiser.blocks, blocks),
        epilogue=partial(epilogue, denoiser, parts.elementwise),
        once=partial(prompt, denoiser, denoiser.blocks),
        once_inputs=("encoder_hidden_states", "encoder_hidden_states_image"),
    )


def video_block(block: Any, *, index: int, parts: Parts, text: int | None = None) -> CrossBlock:
    """One block, whose keys and values of the text are the `text`-th (the `index`-th) of the context's."""
    return CrossBlock(
        table=block.scale_shift_table,
        index=index,
        attention=TurnedAttention(block.attn1, parts=parts),
        cross=TextAttention(block.attn2, index=index if text is None else text, parts=parts),
        cross_norm=block.norm2,
        mlp=block.ffn,
        eps=block.norm1.eps,
        parts=parts,
    )


class TurnedAttention:
    """Self attention of a video: queries and keys normalised across all heads, and turned by their positions."""

    def __init__(self, attention: Any, *, parts: Parts) -> None:
        self.attention, self.parts = attention, parts
        (self.reader,) = readers([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)
        (self.heads,) = heads_for(parts.attend, Heads(attention.heads, attention.norm_q, attention.norm_k))

    def __call__(self, normed: Any, context: Mapping[str, Any]) -> torch.Tensor:
        parts, qkv = self.parts, self.reader(normed)
        y = attend_alone(qkv, self.heads, context["tokens"], attend=parts.attend, elementwise=parts.elementwise)
        return projected(self.attention.to_out[0], y, dtype=qkv.dtype)


class TextAttention:
    """Attention to the text and, by the same queries, to the picture; the sum of both."""

    def __init__(self, attention: Any, *, index: int, parts: Parts) -> None:
        self.attention, self.index, self.parts = attention, index, parts
        self.reader = attention.to_q

    def __call__(self, normed: Any, context: Mapping[str, Any]) -> torch.Tensor:
        attention, elementwise, norm = self.attention, self.parts.elementwise, self.attention.norm_q
        q = elementwise.norm(self.reader(normed), kind="rms", weight=norm.weight, eps=norm.eps)
        q = q.unflatten(-1, (attention.heads, -1))
        attended = (self.parts.attend(q, k, v).flatten(2) for k, v in context["text"][self.index])
        return attention.to_out[0](reduce(elementwise.residual, attended))


Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [B, T, H, D / H]."""


def prompt(
    denoiser: Any,
    blocks: Any,
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    encoder_hidden_states_image: torch.Tensor | None = None,  # [B, I, D]
) -> Mapping[str, Any]:
    """What holds for all steps of a prompt: each block's pairs, of the text and of the picture where there is one."""
    embed = denoiser.condition_embedder
    text = embed.text_embedder(encoder_hidden_states)
    if encoder_hidden_states_image is not None:
        text = torch.cat([embed.image_embedder(encoder_hidden_states_image), text], dim=1)
    return {"text": tuple(_pairs(block.attn2, text) for block in blocks)}


def _pairs(attention: Any, text: torch.Tensor) -> tuple[Pair, ...]:
    heads = (attention.heads, -1)

    def pair(to_k: Any, norm: Any, to_v: Any, x: torch.Tensor) -> Pair:
        return norm(to_k(x)).unflatten(2, heads), to_v(x).unflatten(2, heads)

    if attention.add_k_proj is None:
        return (pair(attention.to_k, attention.norm_k, attention.to_v, text),)
    ends = text.shape[1] - ENCODED_TOKENS
    return (
        pair(attention.to_k, attention.norm_k, attention.to_v, text[:, ends:]),
        pair(attention.add_k_proj, attention.norm_added_k, attention.add_v_proj, text[:, :ends]),
    )


def outside(blocks: Any) -> Iterator[Any]:
    """What is read of blocks outside of their steps: by `prompt`, and the table by the block before."""
    for block in blocks:
        attention = block.attn2
        linears = (attention.to_k, attention.to_v, attention.add_k_proj, attention.add_v_proj)
        yield from (block.scale_shift_table, *(linear for linear in linears if linear is not None))


def prologue(
    denoiser: Any,
    *,
    hidden_states: torch.Tensor,  # [B, C, F, H, W]
    timestep: torch.Tensor,  # [B], or [B, S] where each position has its own, 0 to 1000
    once: Mapping[str, Any],
    return_dict: bool = True,
    **unused: Any,
) -> State:
    """Everything before the blocks: patches, positions, and the embedding of time."""
    x = denoiser.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, S, D]
    embed = denoiser.condition_embedder
    waves = embed.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
    time = embed.time_embedder(waves.to(embed.time_embedder.linear_1.weight.dtype)).to(x.dtype)
    cos, sin = denoiser.rope(hidden_states)  # [1, S, 1, head size], each angle twice
    context = {
        "modulation": embed.time_proj(embed.act_fn(time)).unflatten(-1, (6, -1)).unbind(-2),
        "time": time,
        "text": once["text"],
        "tokens": Tokens(cos[0, :, 0, ::2], sin[0, :, 0, ::2]),
        "grid": grid(denoiser, {"hidden_states": hidden_states}),
        "return_dict": return_dict,
    }
    return State(x=x, context=context)


def _signal(state: State) -> torch.Tensor:
    """The projected embedding of time, as the family's: [B, 6, D] or [B, S, 6, D]."""
    return torch.stack(state.context["modulation"], dim=-2)


def epilogue(denoiser: Any, elementwise: Elementwise, state: State) -> Any:
    """The output layers, and the video put together."""
    context, norm = state.context, denoiser.norm_out
    shift, scale = sums((context["time"],) * 2, denoiser.scale_shift_table)
    x = denoiser.proj_out(elementwise.norm(state.x, shift=shift, scale=scale, eps=norm.eps))
    video = video_of(denoiser, x, grid=context["grid"])
    return Transformer2DModelOutput(sample=video) if context["return_dict"] else (video,)


WAN = Fused(
    summary="text keys and values once per prompt, q k v in one, their norm across heads with the rotation, "
    "residuals with the norms that follow",
    check=check,
    declines=declines,
    build=build,
    outside=lambda denoiser: outside(denoiser.blocks),
)
