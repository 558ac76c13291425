"""Stable Diffusion 3's joint blocks (arXiv 2403.03206), fused.

The modulation of all blocks is one GEMM a step, q, k and v of each stream are one GEMM, the text projections are done
once per prompt, and the identical zero tokens that stand for an absent T5 encoder are folded (`fold.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vivace.attention.backend import Attend
from vivace.family import Block, Split, State
from vivace.fused.contract import Fused
from vivace.fused.elementwise import TORCH, Elementwise, elementwise_for
from vivace.fused.fold import fold_zero_tokens
from vivace.fused.modulation import Modulation
from vivace.fused.stack import Stack, beside


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    for index, block in enumerate(denoiser.transformer_blocks):
        for attention in filter(None, (block.attn, block.attn2)):
            if type(attention.processor) is not JointAttnProcessor2_0:
                return f"block {index} has a {type(attention.processor).__name__}"
        if block._chunk_size is not None:
            return f"block {index} computes its feed-forward in chunks"
    return None


def declines(*, joint_attention_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    if set(joint_attention_kwargs or {}) - {"scale"}:
        return f"the call brings {', '.join(sorted(joint_attention_kwargs or {}))}"
    return None


def _norms(denoiser: Any):
    for index, block in enumerate(denoiser.transformer_blocks):
        yield f"{index}.image", block.norm1.linear
        yield f"{index}.text", block.norm1_context.linear
    yield "out", denoiser.norm_out.linear


class JointBlock:
    """One joint block: image `[B, S, D]` and text `[B, T, D]` attend to each other and go through their own MLPs."""

    def __init__(
        self, block: Any, *, spans: tuple[slice, slice], attend: Attend, elementwise: Elementwise, undo: ExitStack
    ) -> None:
        attention = block.attn
        self.block, self.spans = block, spans
        self.attend, self.elementwise = attend, elementwise
        self.image_qkv = Stack([attention.to_q, attention.to_k, attention.to_v], undo=undo)
        second = block.attn2
        self.second_qkv = second and Stack([second.to_q, second.to_k, second.to_v], undo=undo)
        self.text_qkv = Stack([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], undo=undo)

    def __call__(self, state: State) -> State:
        block, context, norm = self.block, state.context, self.elementwise.norm
        x, text = state.x, state.text
        assert text is not None
        image_parts, text_parts = (context["modulation"][span] for span in self.spans)
        last = block.context_pre_only
        text_scale, text_shift = text_parts if last else (text_parts[1], text_parts[0])
        attended = self._attention(
            norm(x, shift=image_parts[0], scale=image_parts[1]), norm(text, shift=text_shift, scale=text_scale), context
        )
        second = None
        if len(image_parts) > 6:
            shift, scale, gate = image_parts[6:]
            second = self._second_attention(norm(x, shift=shift, scale=scale)), gate
        x = self._stream(x, block.attn.to_out[0](attended[:, : x.shape[1]]), block.ff, image_parts, second)
        if not last:
            text = self._stream(text, block.attn.to_add_out(attended[:, x.shape[1] :]), block.ff_context, text_parts)
        return State(x=x, text=text, context=context)

    def _stream(
        self, x: torch.Tensor, y: torch.Tensor, mlp: Any, parts: Any, second: tuple[torch.Tensor, Any] | None = None
    ) -> torch.Tensor:
        """One stream after attention's share `y`, and the second attention's with its gate: residuals and MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = parts[:6]
        if second is not None:
            x = self.elementwise.residual(x, y, gate=gate)
            y, gate = second
        up, _, down = mlp.net
        x, normed = self.elementwise.residual_norm(x, y, gate=gate, shift=mlp_shift, scale=mlp_scale)
        if beside(up.proj):
            y = down(self.elementwise.gelu(up.proj(normed)))
        else:
            y = down(self.elementwise.linear_gelu(normed, up.proj.weight, up.proj.bias))
        return self.elementwise.residual(x, y, gate=mlp_gate)

    def _attention(self, image: torch.Tensor, text: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
        """`[B, S + T, D]` of the normalised image and text tokens."""
        attention, repeats = self.block.attn, context["repeats"]
        joint = image.shape[1] + text.shape[1]
        q, k, v = (self._empty(image, joint + more) for more in (0, repeats, repeats))
        self._heads(self.image_qkv(image), attention.norm_q, attention.norm_k, q=q, k=k, v=v)
        norms = attention.norm_added_q, attention.norm_added_k
        self._heads(self.text_qkv(text), *norms, q=q, k=k, v=v, offset=image.shape[1])
        if repeats:
            k[:, joint:], v[:, joint:] = k[:, joint - 1 : joint], v[:, joint - 1 : joint]
        return self.attend(q, k, v, mask=context["bias"]).flatten(2)

    def _second_attention(self, image: torch.Tensor) -> torch.Tensor:
        """The image tokens among themselves, where a block has that too (SD 3.5 medium): `[B, S, D]`."""
        attention, qkv = self.block.attn2, self.second_qkv(image)
        q, k = (self._empty(image, image.shape[1]) for _ in range(2))
        self._heads(qkv, attention.norm_q, attention.norm_k, q=q, k=k)
        v = qkv.unflatten(-1, (3, *q.shape[2:]))[:, :, 2]
        return attention.to_out[0](self.attend(q, k, v).flatten(2))

    def _empty(self, like: torch.Tensor, tokens: int) -> torch.Tensor:
        heads = self.block.attn.heads
        return like.new_empty(like.shape[0], tokens, heads, like.shape[2] // heads)

    def _heads(self, qkv: torch.Tensor, norm_q: Any, norm_k: Any, **out: Any) -> None:
        weights = {} if norm_q is None else {"q_weight": norm_q.weight, "k_weight": norm_k.weight, "eps": norm_q.eps}
        self.elementwise.heads(qkv, **weights, **out)


def fuse(denoiser: Any, *, attend: Attend, undo: ExitStack) -> Split:
    """The fused Split of an SD3Transformer2DModel."""
    return fuse_with(denoiser, attend=attend, undo=undo, elementwise=elementwise_for(denoiser.device))


def fuse_with(denoiser: Any, *, attend: Attend, undo: ExitStack, elementwise: Elementwise) -> Split:
    """`fuse`, with a form of the arithmetic of one's own choice."""
    modulation = Modulation(_norms(denoiser), undo=undo)
    blocks = []
    for index, module in enumerate(denoiser.transformer_blocks):
        spans = (modulation.spans[f"{index}.image"], modulation.spans[f"{index}.text"])
        fused = JointBlock(module, spans=spans, attend=attend, elementwise=elementwise, undo=undo)
        forward = _controlled(fused, index, len(denoiser.transformer_blocks))
        blocks.append(Block(name=f"transformer_blocks.{index}", module=module, forward=forward))

    def once(encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor) -> Mapping[str, Any]:
        # On GPUs attention takes its fastest kernels only without a bias.
        folded = fold_zero_tokens(encoder_hidden_states, repeat=elementwise is not TORCH)
        return {
            "text": denoiser.context_embedder(folded.text),
            "bias": folded.bias,
            "repeats": folded.repeats,
            "pooled": denoiser.time_text_embed.text_embedder(pooled_projections),
        }

    return Split(
        prologue=_prologue(denoiser, modulation),
        blocks=tuple(blocks),
        epilogue=_epilogue(denoiser, modulation.spans["out"], elementwise),
        once=once,
        once_inputs=("encoder_hidden_states", "pooled_projections"),
    )


def _controlled(block: JointBlock, index: int, blocks: int) -> Callable[[State], State]:
    """The block, unless the call skips it, and then the ControlNet's residual."""

    def forward(state: State) -> State:
        if index not in state.context["skip"]:
            state = block(state)
        residuals = state.context["control"]
        if residuals is not None and not block.block.context_pre_only:
            state.x = state.x + residuals[int(index / (blocks / len(residuals)))]
        return state

    return forward


def _prologue(denoiser: Any, modulation: Modulation) -> Callable[..., State]:
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
        x = denoiser.pos_embed(hidden_states).contiguous()
        context = {
            "modulation": modulation(embedding),
            "bias": None if once["bias"] is None else F.pad(once["bias"], (x.shape[1], 0)),
            "repeats": once["repeats"],
            "control": block_controlnet_hidden_states,
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
    summary="modulation of all blocks in one GEMM, q k v in one, text projected once per prompt, zero tokens folded",
    devices=frozenset({"cpu", "cuda"}),
    check=check,
    declines=declines,
    fuse=fuse,
    sides=True,
)
