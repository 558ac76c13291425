"""FLUX.1's denoiser, fused: prologue, blocks and epilogue as one stream of large products and fused passes.

Rotary tables and text projections are made once per prompt, the modulation of all blocks is one GEMM a step, and a
block's last pass (gate, residual) already normalises and modulates for the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from vivace.attention.backend import Attend
from vivace.errors import InputError
from vivace.families.flux import spread
from vivace.family import Block, Split, State
from vivace.fused.contract import Fused
from vivace.fused.elementwise import Elementwise, elementwise_for
from vivace.fused.flux_blocks import DoubleBlock, Parts, SingleBlock
from vivace.fused.modulation import Modulation


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    for name, block in _named_blocks(denoiser):
        processor = block.attn.processor
        if type(processor) is not FluxAttnProcessor:
            return f"{name} has a {type(processor).__name__}"
        if processor._attention_backend is not None or processor._parallel_config is not None:
            return (
                f"{name} has an attention backend of diffusers' own; vivace.accelerate(pipe, attention=...) sets ours"
            )
        if block.attn.fused_projections:
            return f"{name} has its projections fused by diffusers; pipe.unfuse_qkv_projections() first"
    return None


def declines(*, joint_attention_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    brings = set(joint_attention_kwargs or {}) - {"scale"}
    return f"the call brings {', '.join(sorted(brings))}" if brings else None


def fuse(denoiser: Any, *, attend: Attend, undo: ExitStack) -> Split:
    """The fused Split of a FluxTransformer2DModel."""
    return fuse_with(denoiser, attend=attend, undo=undo, elementwise=elementwise_for(denoiser.device))


def fuse_with(denoiser: Any, *, attend: Attend, undo: ExitStack, elementwise: Elementwise) -> Split:
    """`fuse`, with a form of the arithmetic of one's own choice."""
    modulation = Modulation(_norms(denoiser), undo=undo)
    parts = Parts(attend=attend, elementwise=elementwise, undo=undo)
    return Split(
        prologue=partial(_prologue, denoiser, modulation),
        blocks=_blocks(denoiser, modulation.spans, parts),
        epilogue=partial(_epilogue, denoiser, modulation.spans["out"], elementwise),
        once=partial(_once, denoiser),
        once_inputs=("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"),
    )


def _named_blocks(denoiser: Any):
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(denoiser, name)):
            yield f"{name}.{index}", block


def _norms(denoiser: Any):
    for index, block in enumerate(denoiser.transformer_blocks):
        yield f"{index}.image", block.norm1.linear
        yield f"{index}.text", block.norm1_context.linear
    for index, block in enumerate(denoiser.single_transformer_blocks):
        yield f"{index}.single", block.norm.linear
    yield "out", denoiser.norm_out.linear


def _blocks(denoiser: Any, spans: Mapping[str, slice], parts: Parts) -> tuple[Block, ...]:
    double, single = len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)
    pairs = [(spans[f"{i}.image"], spans[f"{i}.text"]) for i in range(double)]
    joint = [spans[f"{i}.single"] for i in range(single)]
    blocks = []
    for name, module in _named_blocks(denoiser):
        index = int(name.rsplit(".", 1)[1])
        if name.startswith("single"):
            following = joint[index + 1] if index + 1 < single else None
            forward: Callable[[State], State] = SingleBlock(
                module, index=index, first=double, span=joint[index], following=following, parts=parts
            )
        else:
            pair = pairs[index + 1] if index + 1 < double else None
            forward = DoubleBlock(module, index=index, spans=pairs[index], following=pair, parts=parts)
        blocks.append(Block(name=name, module=module, forward=forward))
    return tuple(blocks)


def _once(
    denoiser: Any,
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    pooled_projections: torch.Tensor,  # [B, D]
    txt_ids: torch.Tensor,  # [T, 3]
    img_ids: torch.Tensor,  # [S, 3]
) -> Mapping[str, torch.Tensor]:
    """What holds for all steps of a prompt at one size."""
    # Positions once had a batch dimension.
    ids = torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])
    cos, sin = denoiser.pos_embed(ids)  # [T + S, head size], each angle twice
    return {
        "text": denoiser.context_embedder(encoder_hidden_states),
        "pooled": denoiser.time_text_embed.text_embedder(pooled_projections),
        "cos": cos[:, ::2].contiguous(),
        "sin": sin[:, ::2].contiguous(),
    }


def _prologue(
    denoiser: Any,
    modulation: Modulation,
    *,
    hidden_states: torch.Tensor,  # [B, S, C]
    timestep: torch.Tensor,  # [B], 0 to 1
    once: Mapping[str, torch.Tensor],
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
    embedding = embed.timestep_embedder(embed.time_proj(timestep.to(x.dtype) * 1000).to(pooled.dtype))
    if guidance is not None:
        embedding = embedding + embed.guidance_embedder(embed.time_proj(guidance.to(x.dtype) * 1000).to(pooled.dtype))
    single = denoiser.single_transformer_blocks
    context = {
        "modulation": modulation(embedding + pooled),
        "cos": once["cos"],
        "sin": once["sin"],
        "control": spread(controlnet_block_samples, denoiser.transformer_blocks, repeat=controlnet_blocks_repeat),
        "single_control": spread(controlnet_single_block_samples, single),
        "return_dict": return_dict,
    }
    return State(x=x, text=once["text"], context=context)


def _epilogue(denoiser: Any, span: slice, elementwise: Elementwise, state: State) -> Any:
    scale, shift = state.context["modulation"][span]
    x = denoiser.proj_out(elementwise.norm(state.x, shift=shift, scale=scale))
    return Transformer2DModelOutput(sample=x) if state.context["return_dict"] else (x,)


FLUX = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, text and rotary tables once per prompt, "
    "a block's residual with the next one's norm",
    devices=frozenset({"cpu", "cuda"}),
    check=check,
    declines=declines,
    fuse=fuse,
    sides=True,
)
