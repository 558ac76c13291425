"""FLUX.2's denoiser, fused: FLUX.1's two kinds of blocks with SwiGLUs, and one modulation for all blocks of a kind.

Text projections and rotary tables are made once per prompt, and a block's last pass (gate, residual) already
normalises and modulates for the next block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    Flux2Transformer2DModelOutput,
)

from vivace.family import Split, State
from vivace.fused.contract import Fused, brings
from vivace.fused.double_single import blocks_of, foreign, positions
from vivace.fused.heads import Heads
from vivace.fused.joint import JointBlock, Mlp, epilogue, streams_of
from vivace.fused.modulation import Modulation
from vivace.fused.parts import Parts
from vivace.fused.single import OneProduct, SingleBlock
from vivace.fused.stack import readers

# Those that keep keys and values compute what the others do in calls that ask for nothing to be kept.
PROCESSORS = (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    return foreign(denoiser, known=PROCESSORS)


def declines(
    *, joint_attention_kwargs: Mapping[str, Any] | None = None, kv_cache_mode: str | None = None, **kwargs: Any
) -> str | None:
    """Why one call must take the stock path, or None."""
    if kv_cache_mode is not None:
        return "the call keeps keys and values of its references, or uses kept ones"
    return brings(joint_attention_kwargs)


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a Flux2Transformer2DModel."""
    modulation = Modulation([_norms(denoiser)], undo=parts.undo)
    return Split(
        prologue=partial(_prologue, denoiser, modulation),
        blocks=blocks_of(
            denoiser,
            double=partial(_double, spans=modulation.spans, parts=parts),
            single=partial(_single, spans=modulation.spans, parts=parts),
        ),
        epilogue=partial(epilogue, denoiser, modulation.spans["out"], parts, output=Flux2Transformer2DModelOutput),
        once=partial(_once, denoiser),
        once_inputs=("encoder_hidden_states", "txt_ids", "img_ids"),
    )


def _norms(denoiser: Any) -> Mapping[str, Any]:
    return {
        "image": denoiser.double_stream_modulation_img.linear,
        "text": denoiser.double_stream_modulation_txt.linear,
        "single": denoiser.single_stream_modulation.linear,
        "out": denoiser.norm_out.linear,
    }


def _double(block: Any, *, index: int, spans: Mapping[str, slice], parts: Parts) -> JointBlock:
    (image_up,) = readers([block.ff.linear_in], undo=parts.undo)
    (text_up,) = readers([block.ff_context.linear_in], undo=parts.undo)
    image, text = streams_of(
        block.attn,
        spans=(spans["image"], spans["text"]),
        mlps=(
            Mlp(up=image_up, down=block.ff.linear_out, gated=True),
            Mlp(up=text_up, down=block.ff_context.linear_out, gated=True),
        ),
        clips=(False, True),
        parts=parts,
    )
    return JointBlock(image, text, index=index, parts=parts)


def _single(block: Any, *, index: int, first: int, spans: Mapping[str, slice], parts: Parts) -> SingleBlock:
    attention = block.attn
    (linear,) = readers([attention.to_qkv_mlp_proj], undo=parts.undo)
    return SingleBlock(
        OneProduct(linear=linear, width=attention.inner_dim, elementwise=parts.elementwise),
        attention.to_out,
        heads=Heads(attention.heads, attention.norm_q, attention.norm_k),
        index=index,
        first=first,
        span=spans["single"],
        parts=parts,
    )


def _once(
    denoiser: Any,
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    txt_ids: torch.Tensor,  # [T, 4]
    img_ids: torch.Tensor,  # [S, 4]
) -> Mapping[str, Any]:
    """What holds for all steps of a prompt at one size."""
    return {
        "text": denoiser.context_embedder(encoder_hidden_states),
        "tokens": positions(denoiser, txt_ids, img_ids),
    }


def _prologue(
    denoiser: Any,
    modulation: Modulation,
    *,
    hidden_states: torch.Tensor,  # [B, S, C]
    timestep: torch.Tensor,  # [B], 0 to 1
    once: Mapping[str, Any],
    guidance: torch.Tensor | None = None,  # [B]
    return_dict: bool = True,
    **unused: Any,
) -> State:
    kind = hidden_states.dtype
    embedding = denoiser.time_guidance_embed(
        timestep.to(kind) * 1000, None if guidance is None else guidance.to(kind) * 1000
    )
    context = {
        "modulation": modulation(F.silu(embedding)).unbind(1),
        "tokens": once["tokens"],
        "control": None,
        "single_control": None,
        "return_dict": return_dict,
    }
    return State(x=denoiser.x_embedder(hidden_states), text=once["text"], context=context)


FLUX2 = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, text and rotary tables once per prompt, "
    "a block's residual with the next one's norm",
    check=check,
    declines=declines,
    build=build,
    outside=lambda denoiser: (),
)
