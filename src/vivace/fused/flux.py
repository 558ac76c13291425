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
from vivace.fused.foresight import foresight_of
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
        once_inputs=("encoder_hidden_states", "pooled_projections", "guidance", "txt_ids", "img_ids"),
        ready=modulation.ready,
        signal=partial(signal, modulation.spans["0.image"], parts),
        foresight=foresight_of(parts, modulation=modulation, embed=partial(_embedding, denoiser), unit=1000),
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
    guidance: torch.Tensor | None,  # [B]
    txt_ids: torch.Tensor,  # [T, 3]
    img_ids: torch.Tensor,  # [S, 3]
) -> Mapping[str, Any]:
    """What holds for all steps of a prompt at one size."""
    embed = denoiser.time_text_embed
    if (guidance is not None) != hasattr(embed, "guidance_embedder"):
        raise InputError(
            f"this model {'takes no' if guidance is not None else 'needs a'} guidance, got guidance={guidance}; "
            "the pipeline's guidance_scale sets it where its config has guidance_embeds"
        )
    once = {
        "text": denoiser.context_embedder(encoder_hidden_states),
        "pooled": embed.text_embedder(pooled_projections),
        "tokens": positions(denoiser, txt_ids, img_ids),
        "frequencies": _frequencies(embed.time_proj, device=pooled_projections.device),
    }
    if guidance is None:
        return {**once, "guidance": None}
    return {**once, "guidance": embed.guidance_embedder(_waves(guidance.to(encoder_hidden_states.dtype), once))}


def _frequencies(projection: Any, *, device: torch.device) -> torch.Tensor:
    """Those of the waves that times become, by diffusers' formula."""
    half = projection.num_channels // 2
    exponent = -log(10000) * torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(exponent / (half - projection.downscale_freq_shift))


def _embedding(
    denoiser: Any,
    times: torch.Tensor,  # [N], 0 to 1: of as many steps as there are samples in N
    once: Mapping[str, Any],
    kwargs: Mapping[str, Any] = {},
) -> torch.Tensor:
    """[N, D], of time, guidance and pooled text."""
    embedding = denoiser.time_text_embed.timestep_embedder(_waves(times, once))
    steps = embedding.unflatten(0, (-1, len(once["pooled"])))
    if once["guidance"] is not None:
        steps = steps + once["guidance"]
    return F.silu(steps + once["pooled"]).flatten(0, 1)


def _waves(numbers: torch.Tensor, once: Mapping[str, Any]) -> torch.Tensor:
    """What numbers [N] become before they are embedded, [N, waves], by diffusers' formula."""
    angles = (numbers * 1000)[:, None].float() * once["frequencies"]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(once["pooled"].dtype)


def _prologue(
    denoiser: Any,
    *,
    hidden_states: torch.Tensor,  # [B, S, C]
    timestep: torch.Tensor,  # [B], 0 to 1
    once: Mapping[str, Any],
    controlnet_block_samples: list[torch.Tensor] | None = None,
    controlnet_single_block_samples: list[torch.Tensor] | None = None,
    controlnet_blocks_repeat: bool = False,
    return_dict: bool = True,
    **unused: Any,
) -> State:
    x = denoiser.x_embedder(hidden_states)
    single = denoiser.single_transformer_blocks
    context = {
        "embedding": _embedding(denoiser, timestep.to(x.dtype), once),
        "modulation": (),
        "made": once.get("made"),
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
