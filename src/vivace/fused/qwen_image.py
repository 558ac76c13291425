"""Qwen-Image's joint blocks (arXiv 2508.02324), fused.

The modulation of all blocks is one GEMM a step, text projections and rotary tables are made once per prompt, and where
prompts of a batch differ in length each attends to its own words without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from vivace.families.qwen_image import spread
from vivace.family import Split, State
from vivace.fused.contract import Fused, brings, foreign_attention
from vivace.fused.foresight import foresight_of
from vivace.fused.heads import Tokens
from vivace.fused.joint import JointBlock, Mlp, chained, epilogue, streams_of
from vivace.fused.modulation import Modulation, modulating
from vivace.fused.parts import Parts


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    attentions = ((f"transformer_blocks.{i}", block.attn) for i, block in enumerate(denoiser.transformer_blocks))
    return foreign_attention(attentions, known=(QwenDoubleStreamAttnProcessor2_0,))


def declines(
    *,
    img_shapes: Sequence[Any] = (),
    attention_kwargs: Mapping[str, Any] | None = None,
    guidance: torch.Tensor | None = None,
    **kwargs: Any,
) -> str | None:
    """Why one call must take the stock path, or None."""
    if any(shapes != img_shapes[0] for shapes in img_shapes):
        return "its samples have pictures of several sizes"
    return brings(attention_kwargs) or (None if guidance is None else "the call brings a guidance embedding")


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a QwenImageTransformer2DModel."""
    # From Edit-2511 on, the pictures to edit are modulated as at time zero.
    modulation = Modulation(_norms(denoiser), undo=parts.undo, times=2 if denoiser.zero_cond_t else 1)
    modules = denoiser.transformer_blocks
    joint = [_joint(block, i, modulation, parts) for i, block in enumerate(modules)]
    return Split(
        prologue=partial(_prologue, denoiser),
        blocks=chained("transformer_blocks", modules, joint),
        epilogue=partial(epilogue, denoiser, modulation.spans["out"], parts),
        once=partial(_once, denoiser),
        once_inputs=("encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"),
        ready=modulation.ready,
        signal=partial(_signal, modulation.spans["0.text"], parts),
        foresight=foresight_of(parts, modulation=modulation, embed=partial(_foreseeable, denoiser), unit=1000),
    )


def _norms(denoiser: Any) -> Iterator[Mapping[str, Any]]:
    yield {"out": denoiser.norm_out.linear}
    for index, block in enumerate(denoiser.transformer_blocks):
        yield {f"{index}.image": block.img_mod[1], f"{index}.text": block.txt_mod[1]}


def _signal(span: slice, parts: Parts, state: State) -> torch.Tensor:
    """The text's tokens as the first block reads them, whose modulation lies at `span`: [B, T, D]."""
    shift, scale = state.context["modulation"][span][:2]
    return parts.elementwise.norm(state.text, shift=shift, scale=scale)


def _joint(block: Any, index: int, modulation: Modulation, parts: Parts) -> JointBlock:
    span = modulation.spans[f"{index}.image"]
    image, text = streams_of(
        block.attn,
        spans=(span, modulation.spans[f"{index}.text"]),
        mlps=(Mlp.of(block.img_mlp, undo=parts.undo), Mlp.of(block.txt_mlp, undo=parts.undo)),
        clips=(True, True),
        parts=parts,
    )
    still = slice(span.start + 1, span.stop + 1, modulation.times)
    references = replace(image, span=still) if block.zero_cond_t else None
    return JointBlock(image, text, references=references, index=index, parts=parts, image_first=True)


def _once(
    denoiser: Any,
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    encoder_hidden_states_mask: torch.Tensor | None,  # [B, T], true for words
    img_shapes: list[Any],  # of each sample: frames, rows and columns of its pictures, or of its only one
) -> Mapping[str, Any]:
    """What holds for all steps of a prompt at one size. Waits for the device where there is a mask."""
    words, mask = _words(encoder_hidden_states_mask)
    text = encoder_hidden_states if words is None else encoder_hidden_states[:, : max(words)]
    turns = denoiser.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=text.device)
    image = turns[0].shape[0]
    turn = torch.cat(turns)  # [S + T, D / 2], complex
    alike = words is None or len(set(words)) == 1
    tokens = Tokens(
        cos=turn.real.contiguous(),
        sin=turn.imag.contiguous(),
        mask=None if mask is None else F.pad(mask, (image, 0), value=True)[:, None, None],
        lengths=None if alike else tuple(image + count for count in words or ()),
    )
    new = prod(img_shapes[0][0]) if denoiser.zero_cond_t else image
    return {
        "text": denoiser.txt_in(denoiser.txt_norm(text)),
        "tokens": tokens,
        "new": new if new < image else None,
    }


def _words(mask: torch.Tensor | None) -> tuple[list[int] | None, torch.Tensor | None]:
    """How many words each prompt has, where they come first and the padding last; else the mask as it is [B, T]."""
    if mask is None:
        return None, None
    mask = mask.bool()
    counts = mask.sum(1)
    first = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    # A prompt without a word keeps its mask too: sequences of length 0 are no prefix that all can be cut to.
    if not bool((first == mask).all() & (counts > 0).all()):
        return None, mask
    return counts.tolist(), None


def _prologue(
    denoiser: Any,
    *,
    hidden_states: torch.Tensor,  # [B, S, C]
    timestep: torch.Tensor,  # [B], 0 to 1
    once: Mapping[str, Any],
    controlnet_block_samples: list[torch.Tensor] | None = None,
    additional_t_cond: torch.Tensor | None = None,
    return_dict: bool = True,
    **unused: Any,
) -> State:
    x = denoiser.img_in(hidden_states)
    context = {
        "embedding": _embedding(denoiser, timestep.to(x.dtype), x, additional_t_cond),
        "modulation": (),
        "made": once.get("made"),
        "tokens": once["tokens"],
        "new": once["new"],
        "control": spread(controlnet_block_samples, len(denoiser.transformer_blocks)),
        "return_dict": return_dict,
    }
    return State(x=x, text=once["text"], context=context)


def _embedding(
    denoiser: Any, times: torch.Tensor, like: torch.Tensor, additional: torch.Tensor | None = None
) -> torch.Tensor:
    """[N, times, D] of times [N], 0 to 1, in the type of `like`; with that of time zero where the model reads it."""
    several = (times, times * 0) if denoiser.zero_cond_t else (times,)
    embedding = denoiser.time_text_embed(torch.cat(several), like, additional)
    return F.silu(torch.stack(embedding.chunk(len(several)), dim=1))


def _foreseeable(
    denoiser: Any, times: torch.Tensor, once: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """Of many steps, unless the call brings a condition beside the time."""
    if kwargs.get("additional_t_cond") is not None:
        return None
    return _embedding(denoiser, times, once["text"])


QWEN_IMAGE = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, text and rotary tables once per prompt, "
    "a block's residual with the next one's norm",
    check=check,
    declines=declines,
    build=build,
    outside=lambda denoiser: modulating(_norms(denoiser)),
)
