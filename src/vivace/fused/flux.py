"""FLUX.1's denoiser, fused: prologue, blocks and epilogue as one stream of large products and fused passes.

Rotary tables and text projections are made once per prompt, the modulation of all blocks is one GEMM a step, and a
block's last pass (gate, residual) already normalises and modulates for the next block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from vivace.errors import InputError
from vivace.families.flux import spread
from vivace.family import Split, State
from vivace.fused.contract import Fused, brings
from vivace.fused.double_single import blocks_of, foreign, positions
from vivace.fused.heads import Heads
from vivace.fused.joint import JointBlock, Mlp, epilogue, signal, streams_of
from vivace.fused.modulation import Modulation, modulating
from vivace.fused.parts import Parts
from vivace.fused.single import SingleBlock, TwoProducts
from vivace.fused.stack import readers


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    return foreign(denoiser, known=(FluxAttnProcessor,))


def declines(*, joint_attention_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    return brings(joint_attention_kwargs)


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a FluxTransformer2DModel."""
    modulation = Modulation(_norms(denoiser), undo=parts.undo)
    return Split(
        prologue=partial(_prologue, denoiser),
        blocks=blocks_of(
            denoiser,
            double=partial(_double, spans=modulation.spans, parts=parts),
            single=partial(_single, spans=modulation.spans, parts=parts),
        ),
        epilogue=partial(epilogue, denoiser, modulation.spans["out"], parts),
        once=partial(_once, denoiser),
        once_inputs=("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"),
        ready=modulation.ready,
        signal=partial(signal, modulation.spans["0.image"], parts),
    )


def _norms(denoiser: Any) -> Iterator[Mapping[str, Any]]:
    yield {"out": denoiser.norm_out.linear}
    for index, block in enumerate(denoiser.transformer_blocks):
        yield {f"{index}.image": block.norm1.linear, f"{index}.text": block.norm1_context.linear}
    for index, block in enumerate(denoiser.single_transformer_blocks):
        yield {f"{index}.single": block.norm.linear}


def _double(block: Any, *, index: int, spans: Mapping[str, slice], parts: Parts) -> JointBlock:
    image, text = streams_of(
        block.attn,
        spans=(spans[f"{index}.image"], spans[f"{index}.text"]),
        mlps=(Mlp.of(block.ff, undo=parts.undo), Mlp.of(block.ff_context, undo=parts.undo)),
        clips=(False, True),
        parts=parts,
    )
    return JointBlock(image, text, index=index, parts=parts)


def _single(block: Any, *, index: int, first: int, spans: Mapping[str, slice], parts: Parts) -> SingleBlock:
    attention = block.attn
    up, qkv = readers([block.proj_mlp], [attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)
    return SingleBlock(
        TwoProducts(qkv=qkv, up=up, elementwise=parts.elementwise),
        block.proj_out,
        heads=Heads(attention.heads, attention.norm_q, attention.norm_k),
        index=index,
        first=first,
        span=spans[f"{index}.single"],
        parts=parts,
    )


def _once(
    denoiser: Any,
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    pooled_projections: torch.Tensor,  # [B, D]
    txt_ids: torch.Tensor,  # [T, 3]
    img_ids: torch.Tensor,  # [S, 3]
) -> Mapping[str, Any]:
    """What holds for all steps of a prompt at one size."""
    return {
        "text": denoiser.context_embedder(encoder_hidden_states),
        "pooled": denoiser.time_text_embed.text_embedder(pooled_projections),
        "tokens": positions(denoiser, txt_ids, img_ids),
        "frequencies": _frequencies(denoiser.time_text_embed.time_proj, device=pooled_projections.device),
    }


def _frequencies(projection: Any, *, device: torch.device) -> torch.Tensor:
    """Those of the waves that times become, by diffusers' formula."""
    half = projection.num_channels // 2
    exponent = -log(10000) * torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(exponent / (half - projection.downscale_freq_shift))


def _prologue(
    denoiser: Any,
    *,
    hidden_states: torch.Tensor,  # [B, S, C]
    timestep: torch.Tensor,  # [B], 0 to 1
    once: Mapping[str, Any],
    guidance: torch.Tensor | None = None,  # [B]
    controlnet_block_samples: list[torch.Tensor] | None = None,
    controlnet_single_block_samples: list[torch.Tensor] | None = None,
    controlnet_blocks_repeat: bool = False,
    return_dict: bool = True,
    **unused: Any,
) -> State:
    x = denoiser.x_embedder(hidden_states)
    embed, pooled = denoiser.time_text_embed, once["pooled"]
    if (guidance is not None) != hasattr(embed, "guidance_embedder"):
        raise InputError(
            f"this model {'takes no' if guidance is not None else 'needs a'} guidance, got guidance={guidance}; "
            "the pipeline's guidance_scale sets it where its config has guidance_embeds"
        )
    # The waves of both in one go: until the first product of a block the device waits for every launch.
    numbers = [number for number in (timestep, guidance) if number is not None]
    angles = (torch.cat(numbers).to(x.dtype) * 1000)[:, None].float() * once["frequencies"]
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype).split([len(one) for one in numbers])
    embedding = embed.timestep_embedder(waves[0])
    if guidance is not None:
        embedding = embedding + embed.guidance_embedder(waves[1])
    single = denoiser.single_transformer_blocks
    context = {
        "embedding": F.silu(embedding + pooled),
        "modulation": (),
        "tokens": once["tokens"],
        "control": spread(controlnet_block_samples, denoiser.transformer_blocks, repeat=controlnet_blocks_repeat),
        "single_control": spread(controlnet_single_block_samples, single),
        "return_dict": return_dict,
    }
    return State(x=x, text=once["text"], context=context)


FLUX = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, text and rotary tables once per prompt, "
    "a block's residual with the next one's norm",
    check=check,
    declines=declines,
    build=build,
    outside=lambda denoiser: modulating(_norms(denoiser)),
)
