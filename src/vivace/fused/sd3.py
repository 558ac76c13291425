"""Stable Diffusion 3's joint blocks (arXiv 2403.03206), fused.

The modulation of all blocks is one GEMM a step, q, k and v of each stream are one GEMM, the text projections are done
once per prompt, and the identical zero tokens that stand for an absent T5 encoder are folded (`fold.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vivace.families.sd3 import spread
from vivace.family import Split, State
from vivace.fused.contract import Fused, brings, foreign_attention
from vivace.fused.elementwise import TORCH, Elementwise
from vivace.fused.fold import fold_zero_tokens
from vivace.fused.heads import Heads, Tokens, heads_for
from vivace.fused.joint import JointBlock, Mlp, chained, signal, streams_of
from vivace.fused.modulation import Modulation, modulating
from vivace.fused.parts import Parts
from vivace.fused.patches import places_of, tokens_of
from vivace.fused.stack import readers


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    named = [(f"transformer_blocks.{index}", block) for index, block in enumerate(denoiser.transformer_blocks)]
    for name, block in named:
        if block._chunk_size is not None:
            return f"{name} computes its feed-forward in chunks"
    attentions = ((name, attention) for name, block in named for attention in (block.attn, block.attn2) if attention)
    return foreign_attention(attentions, known=(JointAttnProcessor2_0,))


def declines(*, joint_attention_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    return brings(joint_attention_kwargs)


def _norms(denoiser: Any) -> Iterator[Mapping[str, Any]]:
    yield {"out": denoiser.norm_out.linear}
    for index, block in enumerate(denoiser.transformer_blocks):
        yield {f"{index}.image": block.norm1.linear, f"{index}.text": block.norm1_context.linear}


def _joint(block: Any, index: int, spans: Mapping[str, slice], parts: Parts) -> JointBlock:
    own, second = block.attn2, None
    if own is not None:  # the picture's tokens among themselves: the first blocks of SD 3.5 medium
        (qkv,) = readers([own.to_q, own.to_k, own.to_v], undo=parts.undo)
        (heads,) = heads_for(parts.attend, Heads(own.heads, own.norm_q, own.norm_k))
        second = qkv, heads, own.to_out[0]
    image, text = streams_of(
        block.attn,
        spans=(spans[f"{index}.image"], spans[f"{index}.text"]),
        mlps=(
            Mlp.of(block.ff, undo=parts.undo),
            None if block.context_pre_only else Mlp.of(block.ff_context, undo=parts.undo),
        ),
        second=second,
        parts=parts,
    )
    return JointBlock(image, text, index=index, parts=parts, image_first=True)


def _skippable(forward: Callable[[State], State], index: int, state: State) -> State:
    """The block, unless the call skips it (skip-layer guidance); the ControlNet's residual joins all the same."""
    if index not in state.context["skip"]:
        return forward(state)
    residual = state.context["control"] and state.context["control"][index]
    return state if residual is None else replace(state, x=state.x + residual)


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of an SD3Transformer2DModel."""
    modulation = Modulation(_norms(denoiser), undo=parts.undo)
    modules = denoiser.transformer_blocks
    joint = chained(
        "transformer_blocks", modules, [_joint(block, i, modulation.spans, parts) for i, block in enumerate(modules)]
    )
    blocks = tuple(replace(one, forward=partial(_skippable, one.forward, i)) for i, one in enumerate(joint))

    def once(
        encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor, hidden_states: torch.Tensor
    ) -> Mapping[str, Any]:
        # On GPUs attention takes its fastest kernels only without a bias.
        folded = fold_zero_tokens(encoder_hidden_states, repeat=parts.elementwise is not TORCH)
        return {
            "text": denoiser.context_embedder(folded.text),
            "bias": folded.bias,
            "repeats": folded.repeats,
            "pooled": denoiser.time_text_embed.text_embedder(pooled_projections),
            "places": places_of(denoiser.pos_embed, hidden_states),
        }

    return Split(
        prologue=_prologue(denoiser),
        blocks=blocks,
        epilogue=_epilogue(denoiser, modulation.spans["out"], parts.elementwise),
        once=once,
        once_inputs=("encoder_hidden_states", "pooled_projections"),
        once_shapes=("hidden_states",),
        ready=modulation.ready,
        signal=partial(signal, modulation.spans["0.image"], parts),
    )


def _prologue(denoiser: Any) -> Callable[..., State]:
    def prologue(
        *,
        hidden_states: torch.Tensor,  # [B, C, H, W]
        timestep: torch.Tensor,  # [B]
        once: Mapping[str, Any],
        block_controlnet_hidden_states: list[torch.Tensor] | None = None,
        skip_layers: list[int] | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> State:
        height, width = hidden_states.shape[-2:]
        embed = denoiser.time_text_embed
        embedding = embed.timestep_embedder(embed.time_proj(timestep).to(once["pooled"].dtype)) + once["pooled"]
        x = tokens_of(denoiser.pos_embed, hidden_states, once["places"])
        context = {
            "embedding": F.silu(embedding),
            "modulation": (),
            "tokens": Tokens(
                mask=None if once["bias"] is None else F.pad(once["bias"], (x.shape[1], 0)), repeats=once["repeats"]
            ),
            "control": spread(block_controlnet_hidden_states, denoiser.transformer_blocks),
            "skip": skip_layers or (),
            "size": (height, width),
            "return_dict": return_dict,
        }
        return State(x=x, text=once["text"], context=context)

    return prologue


def _epilogue(denoiser: Any, span: slice, elementwise: Elementwise) -> Callable[[State], Any]:
    patch, channels = denoiser.config.patch_size, denoiser.out_channels

    def epilogue(state: State) -> Any:
        scale, shift = state.context["modulation"][span]
        x = denoiser.proj_out(elementwise.norm(state.x, shift=shift, scale=scale))
        rows, columns = (side // patch for side in state.context["size"])
        x = x.view(x.shape[0], rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        sample = x.reshape(x.shape[0], channels, rows * patch, columns * patch)
        return Transformer2DModelOutput(sample=sample) if state.context["return_dict"] else (sample,)

    return epilogue


SD3 = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, text projected once per prompt, zero tokens folded, "
    "a block's residual with the next one's norm",
    check=check,
    declines=declines,
    build=build,
    outside=lambda denoiser: modulating(_norms(denoiser)),
)
