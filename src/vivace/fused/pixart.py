"""PixArt's denoiser, fused.

Keys and values of the text are computed once per prompt, of the tokens that count alone: what the mask leaves out
weighs nothing in the softmax (its logits are 10,000 lower), and attention without a mask takes the fastest kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vivace.errors import InputError
from vivace.families.pixart import picture_of
from vivace.family import Split, State
from vivace.fused.contract import Fused
from vivace.fused.cross_blocks import CrossBlock, sums
from vivace.fused.elementwise import Elementwise
from vivace.fused.joint import chained
from vivace.fused.parts import Parts
from vivace.fused.patches import places_of, tokens_of
from vivace.fused.unet_blocks import SelfAttention, odd_attention

PLAIN: Mapping[str, Any] = {
    "norm_type": "ada_norm_single",
    "only_cross_attention": False,
    "double_self_attention": False,
    "norm_elementwise_affine": False,
    "pos_embed": None,
    "_chunk_size": None,
}
"""Attributes of a block, and the values with which it is what is fused here."""


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    for index, block in enumerate(denoiser.transformer_blocks):
        for attribute, plain in PLAIN.items():
            if getattr(block, attribute) != plain:
                return f"block {index} has {attribute}={getattr(block, attribute)!r}"
        if block.attn2 is None or hasattr(block, "fuser"):
            return f"block {index} has {'no cross attention' if block.attn2 is None else 'a fuser'}"
        up = block.ff.net[0]
        if not isinstance(up, GELU) or up.approximate != "tanh":
            return f"block {index} has a {type(up).__name__} for its activation"
        if block.training and block.dropout:
            return f"block {index} has dropout"
        if (reason := odd_attention(block.attn1) or odd_attention(block.attn2)) is not None:
            return f"block {index} has {reason}"
    return None


def declines(
    *,
    attention_mask: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    cross_attention_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> str | None:
    """Why one call must take the stock path, or None."""
    brings = {name for name, value in (cross_attention_kwargs or {}).items() if name != "scale" and value is not None}
    if attention_mask is not None:
        brings.add("attention_mask")
    if encoder_attention_mask is not None and encoder_attention_mask.ndim != 2:
        brings.add("a bias for encoder_attention_mask")
    return f"the call brings {', '.join(sorted(brings))}" if brings else None


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a PixArtTransformer2DModel."""
    blocks = [_block(block, index=i, parts=parts) for i, block in enumerate(denoiser.transformer_blocks)]
    return Split(
        prologue=partial(_prologue, denoiser),
        blocks=chained("transformer_blocks", denoiser.transformer_blocks, blocks),
        epilogue=partial(_epilogue, denoiser, parts.elementwise),
        once=partial(_prompt, denoiser),
        once_inputs=("encoder_hidden_states", "encoder_attention_mask"),
        once_shapes=("hidden_states",),
    )


def _block(block: Any, *, index: int, parts: Parts) -> CrossBlock:
    return CrossBlock(
        table=block.scale_shift_table,
        index=index,
        attention=PictureAttention(block.attn1, parts=parts),
        cross=TextAttention(block.attn2, index=index, parts=parts),
        cross_norm=None,
        mlp=block.ff,
        eps=block.norm1.eps,
        parts=parts,
    )


class PictureAttention(SelfAttention):
    """The attention of a picture [B, S, D] to itself, for which nothing else counts."""

    def __call__(self, normed: Any, context: Mapping[str, Any]) -> torch.Tensor:
        return super().__call__(normed)


class TextAttention:
    """The attention of a picture to the tokens of its text that count, for samples with as many of them at a time."""

    def __init__(self, attention: Any, *, index: int, parts: Parts) -> None:
        self.attention, self.index, self.attend = attention, index, parts.attend
        self.reader = attention.to_q

    def __call__(self, normed: Any, context: Mapping[str, Any]) -> torch.Tensor:
        q = self.reader(normed).unflatten(-1, (self.attention.heads, -1))
        k, v = context["text"][self.index]
        attended = [
            self.attend(q[first:end], k[first:end, :tokens], v[first:end, :tokens])
            for first, end, tokens in context["groups"]
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self.attention.to_out[0](joined.flatten(2))


def _prompt(
    denoiser: Any,
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    encoder_attention_mask: torch.Tensor | None,  # [B, T], 1 for what counts
    hidden_states: torch.Tensor,  # [B, C, H, W]
) -> Mapping[str, Any]:
    """What holds for all steps of a prompt: each block's keys and values. Waits for the device once, for a mask."""
    text, mask = encoder_hidden_states, encoder_attention_mask
    counts = (text.shape[1],) * len(text)
    # A rehearsal's mask has no values.
    if mask is not None and not mask.is_meta:
        order = mask.ne(0).byte().argsort(dim=1, descending=True, stable=True)
        # Where nothing counts, all does: every logit is as much lower.
        counts = tuple(int(count) or text.shape[1] for count in mask.ne(0).sum(1).tolist())
        text = text.take_along_dim(order[..., None], dim=1)[:, : max(counts)]
    if denoiser.caption_projection is not None:
        text = denoiser.caption_projection(text)
    return {
        "text": tuple(_pair(block.attn2, text) for block in denoiser.transformer_blocks),
        "counts": counts,
        "places": places_of(denoiser.pos_embed, hidden_states),
    }


def _pair(attention: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = (attention.heads, -1)
    return attention.to_k(text).unflatten(2, heads), attention.to_v(text).unflatten(2, heads)


def _outside(denoiser: Any) -> Iterator[Any]:
    for block in denoiser.transformer_blocks:
        yield from (block.scale_shift_table, block.attn2.to_k, block.attn2.to_v)


def _groups(counts: tuple[int, ...], samples: int) -> tuple[tuple[int, int, int], ...]:
    """Neighbours with as many tokens: the first, the one after the last, and their tokens."""
    # A cache may compute the second half of the samples alone.
    groups, first = [], 0
    for count, same in groupby(counts[len(counts) - samples :]):
        groups.append((first, first := first + len([*same]), count))
    return tuple(groups)


def _prologue(
    denoiser: Any,
    *,
    hidden_states: torch.Tensor,  # [B, C, H, W]
    timestep: torch.Tensor,  # [B]
    once: Mapping[str, Any],
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    return_dict: bool = True,
    **unused: Any,
) -> State:
    if denoiser.use_additional_conditions and added_cond_kwargs is None:
        raise InputError("this PixArt embeds size and aspect ratio; pass added_cond_kwargs (resolution, aspect_ratio)")
    x, batch = tokens_of(denoiser.pos_embed, hidden_states, once["places"]), len(hidden_states)
    vectors, time = denoiser.adaln_single(timestep, added_cond_kwargs, batch_size=batch, hidden_dtype=x.dtype)
    context = {
        "modulation": vectors.unflatten(-1, (6, -1)).unbind(-2),
        "time": time,
        "text": once["text"],
        "groups": _groups(once["counts"], batch),
        "grid": tuple(side // denoiser.config.patch_size for side in hidden_states.shape[-2:]),
        "return_dict": return_dict,
    }
    return State(x=x, context=context)


def _epilogue(denoiser: Any, elementwise: Elementwise, state: State) -> Any:
    context = state.context
    shift, scale = sums((context["time"],) * 2, denoiser.scale_shift_table)
    x = elementwise.norm(state.x, shift=shift, scale=scale, eps=denoiser.norm_out.eps)
    picture = picture_of(denoiser, denoiser.proj_out(x), grid=context["grid"])
    return Transformer2DModelOutput(sample=picture) if context["return_dict"] else (picture,)


PIXART = Fused(
    summary="keys and values once per prompt, of the text that counts alone, q k v in one, "
    "residuals with the norms that follow",
    check=check,
    declines=declines,
    build=build,
    outside=_outside,
)
