"""Z-Image's single-stream blocks (arXiv 2511.22699), fused.

Captions are embedded and refined once per prompt, the modulation of all blocks is one GEMM a step, and one kernel
normalises a branch, adds it to the stream and normalises that for the next branch. Where captions of a batch differ in
length, each sample attends to its own tokens without a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor

from vivace.family import Split, State
from vivace.fused.contract import Fused, foreign_attention
from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import Heads, Tokens, attend_alone, heads_for, projected
from vivace.fused.joint import Ahead, ahead_for, chained
from vivace.fused.modulation import Modulation
from vivace.fused.parts import Parts
from vivace.fused.stack import asks, filled, readers, takes


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    lists = ("noise_refiner", "context_refiner", "layers")
    attentions = ((f"{name}.{i}", b.attention) for name in lists for i, b in enumerate(getattr(denoiser, name)))
    return foreign_attention(attentions, known=(ZSingleStreamAttnProcessor,))


def declines(*, x: Sequence[Any], siglip_feats: Any = None, image_noise_mask: Any = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    if isinstance(x[0], list) or siglip_feats is not None or image_noise_mask is not None:
        return "the call brings several pictures for a sample"
    return "its pictures differ in size" if len({one.shape for one in x}) > 1 else None


class SandwichBlock:
    """Attention and SwiGLU, each between two RMSNorms, on one stream [B, S, D].

    `span` is the place of its modulation: scale and gate of attention, scale and gate of the MLP; None: it has none.
    """

    def __init__(self, block: Any, *, index: int, span: slice | None, parts: Parts) -> None:
        attention = block.attention
        self.block, self.index, self.span = block, index, span
        self.attend, self.elementwise = parts.attend, parts.elementwise
        (self.qkv,) = readers([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)
        self.gate, self.up = readers([block.feed_forward.w1], [block.feed_forward.w3], undo=parts.undo)
        (self.heads,) = heads_for(parts.attend, Heads(attention.heads, attention.norm_q, attention.norm_k))
        self.following: SandwichBlock | None = None

    def __call__(self, state: State) -> State:
        modulation, residual = state.context["modulation"], state.context["control"].get(self.index)
        following = self.following if residual is None else None
        ahead = ahead_for(state, self.index)
        x, normed = self.step(
            state.x, ahead and ahead.normed[0], modulation, state.context["tokens"], following=following
        )
        if residual is not None:
            x = x + residual
        return replace(state, x=x, ahead=following and Ahead(x, None, self.index + 1, None, (normed,)))

    def step(
        self, x: torch.Tensor, normed: Any, modulation: Any, tokens: Tokens, *, following: SandwichBlock | None = None
    ) -> tuple[torch.Tensor, Any]:
        """The stream after this block, and its first norm for the `following` one; `normed`, if known, is its own."""
        block, down, elementwise = self.block, self.block.feed_forward.w2, self.elementwise
        _, gate, scale, mlp_gate = (None,) * 4 if self.span is None else modulation[self.span]
        normed = elementwise.norm(x, **self.norm(modulation)) if normed is None else normed
        y = attend_alone(self.qkv(normed), self.heads, tokens, attend=self.attend, elementwise=elementwise)
        y = projected(block.attention.to_out[0], y, dtype=x.dtype)
        inner = _norm(block.ffn_norm1, scale, asks(self.gate, self.up))
        x, normed = elementwise.residual_norm(x, y, y_weight=block.attention_norm2.weight, gate=gate, **inner)
        normed = filled(normed, self.gate)
        y = down(elementwise.glu(self.up(normed), self.gate(normed), kind="silu", quantize=takes(down)))
        last = block.ffn_norm2
        if following is None:
            return elementwise.residual(x, elementwise.norm(y, **_norm(last, None, {})), gate=mlp_gate), None
        return elementwise.residual_norm(x, y, y_weight=last.weight, gate=mlp_gate, **following.norm(modulation))

    def norm(self, modulation: Any) -> dict[str, Any]:
        """Its first norm, as keywords of the arithmetic."""
        scale = None if self.span is None else modulation[self.span][0]
        return _norm(self.block.attention_norm1, scale, asks(self.qkv))


def _norm(norm: Any, scale: torch.Tensor | None, asked: dict[str, Any]) -> dict[str, Any]:
    return {"weight": norm.weight, "eps": norm.eps, "kind": "rms", "scale": scale, **asked}


def _refined(blocks: Sequence[SandwichBlock], x: torch.Tensor, modulation: Any, tokens: Tokens) -> torch.Tensor:
    """`x` after all of `blocks`."""
    normed = None
    for block, following in pairwise((*blocks, None)):
        assert block is not None
        x, normed = block.step(x, normed, modulation, tokens, following=following)
    return x


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a ZImageTransformer2DModel."""
    modulated = [*denoiser.noise_refiner, *denoiser.layers]
    norms = {str(i): block.adaLN_modulation[0] for i, block in enumerate(modulated)}
    modulation = Modulation([norms], undo=parts.undo, width=denoiser.dim)

    def fused(modules: Sequence[Any], first: int | None) -> list[SandwichBlock]:
        spans = [None if first is None else modulation.spans[str(first + i)] for i in range(len(modules))]
        pairs = enumerate(zip(modules, spans, strict=True))
        return [SandwichBlock(block, index=i, span=span, parts=parts) for i, (block, span) in pairs]

    refiner = fused(denoiser.noise_refiner, 0)
    return Split(
        prologue=partial(_prologue, denoiser, modulation, refiner),
        blocks=chained("layers", denoiser.layers, fused(denoiser.layers, len(refiner))),
        epilogue=partial(_epilogue, denoiser, parts.elementwise),
        once=partial(_once, denoiser, fused(denoiser.context_refiner, None)),
        once_inputs=("cap_feats", "patch_size", "f_patch_size"),
        once_shapes=("x",),
    )


def _outside(denoiser: Any) -> list[Any]:
    linears = [block.adaLN_modulation for block in denoiser.layers]
    return [denoiser.noise_refiner, denoiser.context_refiner, *linears]


def _whole(length: int) -> int:
    """The length to which the model pads a caption or picture of so many tokens."""
    return -(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _once(
    denoiser: Any,
    refiner: Sequence[SandwichBlock],
    cap_feats: list[torch.Tensor],  # one [T, D] a sample
    x: list[torch.Tensor],  # one [C, F, H, W] a sample; only the shape is read
    patch_size: int | None = None,
    f_patch_size: int | None = None,
) -> Mapping[str, Any]:
    """What holds for all steps of these captions at one size."""
    lengths = [len(caption) for caption in cap_feats]
    whole = [_whole(length) for length in lengths]
    tokens, differ = max(whole), len(set(whole)) > 1
    rows = denoiser.cap_embedder(torch.cat(cap_feats))
    pad = denoiser.cap_pad_token.to(rows.dtype)
    captions = torch.stack([
        torch.cat((row, pad.expand(end - len(row), -1), row.new_zeros(tokens - end, row.shape[-1])))
        for row, end in zip(rows.split(lengths), whole, strict=True)
    ])  # fmt: skip

    grid = _grid(x[0].shape, patch_size, f_patch_size)
    device = rows.device
    words = _angles(denoiser, device, range(1, tokens + 1), range(1), range(1))  # [T, D / 2]
    # Where a picture begins depends on the caption before it.
    pictures = torch.stack([_picture(denoiser, device, grid, end + 1) for end in (whole if differ else whole[:1])])
    turn = torch.cat((pictures, words.expand(len(pictures), -1, -1)), dim=1)
    cos, sin = turn.real.contiguous(), turn.imag.contiguous()
    if not differ:
        cos, sin = cos[0], sin[0]
    start = pictures.shape[1]
    own = Tokens(words.real.contiguous(), words.imag.contiguous(), lengths=tuple(whole) if differ else None)
    return {
        "caption": _refined(refiner, captions, None, own),
        "picture": Tokens(cos[..., :start, :], sin[..., :start, :]),
        "tokens": Tokens(cos, sin, lengths=tuple(start + end for end in whole) if differ else None),
    }


def _grid(shape: Sequence[int], patch_size: int | None, f_patch_size: int | None) -> tuple[int, int, int]:
    """Patches of a picture [C, F, H, W] in every direction."""
    patch = patch_size or 2
    return shape[1] // (f_patch_size or 1), shape[2] // patch, shape[3] // patch


def _picture(denoiser: Any, device: torch.device, grid: tuple[int, int, int], first: int) -> torch.Tensor:
    """The rotary angles [S, D / 2] of a picture that begins at position `first`; padding stands at 0."""
    frames, rows, columns = grid
    turn = _angles(denoiser, device, range(first, first + frames), range(rows), range(columns))
    rest = _whole(len(turn)) - len(turn)
    return torch.cat((turn, _angles(denoiser, device, range(1), range(1), range(1)).expand(rest, -1)))


def _angles(denoiser: Any, device: torch.device, *axes: range) -> torch.Tensor:
    """The rotary angles of all positions, as complex numbers: [positions, D / 2]."""
    positions = [torch.arange(axis.start, axis.stop, device=device) for axis in axes]
    return denoiser.rope_embedder(torch.cartesian_prod(*positions))


def _prologue(
    denoiser: Any,
    modulation: Modulation,
    refiner: Sequence[SandwichBlock],
    *,
    x: list[torch.Tensor],  # one [C, F, H, W] a sample
    t: torch.Tensor,  # [B]
    once: Mapping[str, Any],
    patch_size: int = 2,
    f_patch_size: int = 1,
    controlnet_block_samples: Mapping[int, torch.Tensor] | None = None,
    return_dict: bool = True,
    **unused: Any,
) -> State:
    kind = f"{patch_size}-{f_patch_size}"
    latents = torch.stack(tuple(x))
    frames, rows, columns = grid = _grid(x[0].shape, patch_size, f_patch_size)
    patches = latents.view(*latents.shape[:2], frames, f_patch_size, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(len(x), frames * rows * columns, -1)
    picture = denoiser.all_x_embedder[kind](patches)
    rest = _whole(picture.shape[1]) - picture.shape[1]
    if rest:
        pad = denoiser.x_pad_token.to(picture.dtype).expand(len(x), rest, -1)
        picture = torch.cat((picture, pad), dim=1)

    embedding = denoiser.t_embedder(t * denoiser.t_scale).type_as(x[0])
    chunks = modulation(embedding)
    chunks[:, 1::2].tanh_()  # the gates
    chunks = chunks.unbind(1)
    picture = _refined(refiner, picture, chunks, once["picture"])
    context = {
        "modulation": chunks,
        "scale": denoiser.all_final_layer[kind].adaLN_modulation(embedding),
        "tokens": once["tokens"],
        "control": controlnet_block_samples or {},
        "grid": grid,
        "patch": (patch_size, f_patch_size),
        "return_dict": return_dict,
    }
    return State(x=torch.cat((picture, once["caption"]), dim=1), context=context)


def _epilogue(denoiser: Any, elementwise: Elementwise, state: State) -> Any:
    (frames, rows, columns), (patch, f_patch) = state.context["grid"], state.context["patch"]
    final = denoiser.all_final_layer[f"{patch}-{f_patch}"]
    x = state.x[:, : frames * rows * columns]
    x = final.linear(elementwise.norm(x, scale=state.context["scale"], eps=final.norm_final.eps))
    x = x.view(-1, frames, rows, columns, f_patch, patch, patch, denoiser.out_channels)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(x), -1, frames * f_patch, rows * patch, columns * patch)
    samples = list(x.unbind())
    return Transformer2DModelOutput(sample=samples) if state.context["return_dict"] else (samples,)


Z_IMAGE = Fused(
    summary="modulation of all blocks in one GEMM, q k v in one, captions refined once per prompt, "
    "a branch's norm and residual with the next one's norm",
    check=check,
    declines=declines,
    build=build,
    outside=_outside,
)
