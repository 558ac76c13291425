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
from vivace.fused.fold import fold_zero_tokens
from vivace.fused.stack import Stack

EPSILON = 1e-6

SCALES = {2: (0,), 6: (1, 4), 9: (1, 4, 7)}
"""Which chunks of a modulation are scales: of two, scale and shift; else of triples of shift, scale and gate."""


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


class Modulation:
    """Shift, scale and gate of every block, both streams, and of the final norm, in one GEMM: chunks of `[B, 1, D]`."""

    def __init__(self, denoiser: Any, *, undo: ExitStack) -> None:
        linears, scales = [], []  # scales: which chunks multiply, and so are used as 1 + scale
        self.spans: dict[str, slice] = {}
        for name, norm in _norms(denoiser):
            start = sum(linear.out_features for linear in linears) // denoiser.inner_dim
            chunks = norm.linear.out_features // denoiser.inner_dim
            scales += [start + place for place in SCALES[chunks]]
            self.spans[name] = slice(start, start + chunks)
            linears.append(norm.linear)
        self.stack = Stack(linears, undo=undo)
        chunks = self.stack.weight.shape[0] // denoiser.inner_dim
        self.one = torch.zeros(chunks, 1, device=self.stack.weight.device, dtype=self.stack.weight.dtype)
        self.one[scales] = 1

    def __call__(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From the embedding `[B, D]` of timestep and pooled text; scales have their 1 added."""
        batch, width = embedding.shape
        rows = self.stack(F.silu(embedding)).view(batch, -1, width) + self.one
        return rows.unsqueeze(2).unbind(1)


def _norms(denoiser: Any):
    for index, block in enumerate(denoiser.transformer_blocks):
        yield f"{index}.image", block.norm1
        yield f"{index}.text", block.norm1_context
    yield "out", denoiser.norm_out


def _norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), scale)


def _feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    up, _, down = module.net
    return down(F.gelu(up.proj(x), approximate="tanh"))


class JointBlock:
    """One joint block: image `[B, S, D]` and text `[B, T, D]` attend to each other and go through their own MLPs."""

    def __init__(self, block: Any, *, spans: tuple[slice, slice], attend: Attend, undo: ExitStack) -> None:
        attention = block.attn
        self.block, self.attend, self.spans = block, attend, spans
        self.heads: int = attention.heads
        self.image_qkv = Stack([attention.to_q, attention.to_k, attention.to_v], undo=undo)
        second = block.attn2
        self.second_qkv = second and Stack([second.to_q, second.to_k, second.to_v], undo=undo)
        self.text_qkv = Stack([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], undo=undo)

    def __call__(self, state: State) -> State:
        block, context = self.block, state.context
        x, text = state.x, state.text
        assert text is not None
        image_parts, text_parts = (context["modulation"][span] for span in self.spans)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second_parts = image_parts
        last = block.context_pre_only
        normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        text_scale, text_shift = text_parts if last else (text_parts[1], text_parts[0])
        attended = self._attention(
            torch.addcmul(shift, normed, scale), _norm_modulate(text, text_scale, text_shift), context["bias"]
        )
        x = torch.addcmul(x, gate, block.attn.to_out[0](attended[:, : x.shape[1]]))
        if second_parts:
            shift, scale, gate = second_parts
            x = torch.addcmul(x, gate, self._second_attention(torch.addcmul(shift, normed, scale)))
        x = torch.addcmul(x, mlp_gate, _feed_forward(block.ff, _norm_modulate(x, mlp_scale, mlp_shift)))
        if not last:
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = text_parts
            text = torch.addcmul(text, gate, block.attn.to_add_out(attended[:, x.shape[1] :]))
            text = torch.addcmul(
                text, mlp_gate, _feed_forward(block.ff_context, _norm_modulate(text, mlp_scale, mlp_shift))
            )
        return State(x=x, text=text, context=context)

    def _attention(self, image: torch.Tensor, text: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[B, S + T, D]` of the normalised image and text tokens; `bias` is added to every key's logits."""
        attention = self.block.attn
        q_image, k_image, v_image = self._heads(self.image_qkv(image), attention.norm_q, attention.norm_k)
        q_text, k_text, v_text = self._heads(self.text_qkv(text), attention.norm_added_q, attention.norm_added_k)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q_image, q_text), (k_image, k_text), (v_image, v_text)))
        return self.attend(q, k, v, mask=bias).flatten(2)

    def _second_attention(self, image: torch.Tensor) -> torch.Tensor:
        """The image tokens among themselves, where a block has that too (SD 3.5 medium): `[B, S, D]`."""
        attention = self.block.attn2
        q, k, v = self._heads(self.second_qkv(image), attention.norm_q, attention.norm_k)
        return attention.to_out[0](self.attend(q, k, v).flatten(2))

    def _heads(self, qkv: torch.Tensor, norm_q: Any, norm_k: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return (norm_q(q) if norm_q else q), (norm_k(k) if norm_k else k), v


def fuse(denoiser: Any, *, attend: Attend, undo: ExitStack) -> Split:
    """The fused Split of an SD3Transformer2DModel."""
    modulation = Modulation(denoiser, undo=undo)
    blocks = []
    for index, module in enumerate(denoiser.transformer_blocks):
        spans = (modulation.spans[f"{index}.image"], modulation.spans[f"{index}.text"])
        fused = JointBlock(module, spans=spans, attend=attend, undo=undo)
        forward = _controlled(fused, index, len(denoiser.transformer_blocks))
        blocks.append(Block(name=f"transformer_blocks.{index}", module=module, forward=forward))

    def once(encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor) -> Mapping[str, Any]:
        folded = fold_zero_tokens(encoder_hidden_states)
        return {
            "text": denoiser.context_embedder(folded.text),
            "weights": folded.bias,
            "pooled": denoiser.time_text_embed.text_embedder(pooled_projections),
        }

    return Split(
        prologue=_prologue(denoiser, modulation),
        blocks=tuple(blocks),
        epilogue=_epilogue(denoiser, modulation.spans["out"]),
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
            "bias": None if once["weights"] is None else F.pad(once["weights"], (x.shape[1], 0)),
            "control": block_controlnet_hidden_states,
            "skip": skip_layers or (),
            "size": (height, width),
            "return_dict": return_dict,
        }
        return State(x=x, text=once["text"], context=context)

    return prologue


def _epilogue(denoiser: Any, span: slice) -> Callable[[State], Any]:
    patch, channels = denoiser.config.patch_size, denoiser.out_channels

    def epilogue(state: State) -> Any:
        scale, shift = state.context["modulation"][span]
        x = denoiser.proj_out(_norm_modulate(state.x, scale, shift))
        rows, columns = (side // patch for side in state.context["size"])
        x = x.view(x.shape[0], rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        sample = x.reshape(x.shape[0], channels, rows * patch, columns * patch)
        return Transformer2DModelOutput(sample=sample) if state.context["return_dict"] else (sample,)

    return epilogue


SD3 = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, text projected once per prompt, zero tokens folded",
    devices=frozenset({"cpu"}),
    check=check,
    declines=declines,
    fuse=fuse,
    sides=True,
)
