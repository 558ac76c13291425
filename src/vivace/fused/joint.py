"""Joint blocks: a stream each for picture and text, which attend to each other (MM-DiT, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vivace.family import Block, State
from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import Heads, Tokens, attend_alone, attend_jointly, heads_for, projected
from vivace.fused.modulation import reaches
from vivace.fused.parts import Parts
from vivace.fused.stack import Stack, asks, readers, takes
from vivace.kernels.row import HeadScaled
from vivace.memory.here import comes

HALF = torch.finfo(torch.float16).max


class Ahead(NamedTuple):
    """What a block computed for the one after it, out of the streams `x` and `text`."""

    x: torch.Tensor
    text: torch.Tensor | Late | None
    reader: int  # index of the block it is for
    joint: torch.Tensor | None  # [B, T + S, D], of which x and text are views
    normed: tuple[Any, ...]  # the streams, or the joint one, normalised and modulated for that block


class Late(NamedTuple):
    """A text stream that a block leaves to the next one, which a cache may skip: then nobody reads it."""

    block: JointBlock
    text: torch.Tensor  # [B, T, D], as it came into the block
    y: torch.Tensor | HeadScaled  # attention's share of it
    vectors: tuple[torch.Tensor, ...]  # its modulation there


def ahead_for(state: State, reader: int) -> Ahead | None:
    """What was computed ahead for block `reader`, unless the streams were changed since (a cache, a ControlNet)."""
    ahead = state.ahead
    if ahead is None or ahead.reader != reader or ahead.x is not state.x or ahead.text is not state.text:
        return None
    return ahead


def clipped(x: torch.Tensor) -> torch.Tensor:
    """`x`, in float16 without infinities, as the stock blocks keep it."""
    return x.clamp_(-HALF, HALF) if x.dtype == torch.float16 else x


def chained(name: str, modules: Iterable[torch.nn.Module], forwards: Sequence[Any]) -> tuple[Block, ...]:
    """The blocks of the denoiser's list `name`, each of which prepares the first norm of the next one."""
    for one, following in pairwise(forwards):
        one.following = following
    pairs = list(zip(modules, forwards, strict=True))
    for module, one in pairs:
        # By the time that the next one runs, its weights are gone.
        one.lends = not comes(module)
    return tuple(Block(name=f"{name}.{i}", module=module, forward=one) for i, (module, one) in enumerate(pairs))


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Up, GELU (tanh) and down; where it is `gated`, the SiLU of up's first half times the second (SwiGLU)."""

    up: Any
    down: Any
    gated: bool = False

    @classmethod
    def of(cls, feed_forward: Any, *, undo: ExitStack) -> Mlp:
        """That of diffusers' FeedForward module."""
        (up,) = readers([feed_forward.net[0].proj], undo=undo)
        return cls(up=up, down=feed_forward.net[2])

    def __call__(self, x: Any, elementwise: Elementwise) -> torch.Tensor:
        if not self.gated:
            return self.down(elementwise.linear_gelu(self.up, x, quantize=takes(self.down)))
        gate, y = self.up(x).chunk(2, dim=-1)
        return self.down(elementwise.glu(y, gate, kind="silu", quantize=takes(self.down)))


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What is one stream's own in a joint block.

    `span` is the place of its modulation: shift, scale and gate of attention, the same of the MLP, and the same of
    `second`, an attention of the stream to itself. A last block's text has no `out`: it ends as keys and values.
    """

    qkv: Stack
    heads: Heads
    span: slice
    out: Any | None
    mlp: Mlp | None
    second: tuple[Stack, Heads, Any] | None = None  # its products, heads and output projection
    clips: bool = False  # stays finite in float16

    def norm(self, modulation: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The norm before attention, as keywords of the arithmetic."""
        shift, scale = modulation[self.span][:2]
        if self.out is None:
            shift, scale = scale, shift  # the order of diffusers' AdaLayerNormContinuous
        return {"shift": shift, "scale": scale, **asks(self.qkv)}


def streams_of(
    attention: Any,
    *,
    spans: tuple[slice, slice],
    mlps: tuple[Mlp, Mlp | None],
    parts: Parts,
    second: Any = None,
    clips: tuple[bool, bool] = (False, False),
) -> tuple[Stream, Stream]:
    """Image and text of a block with diffusers' joint attention; the text ends with a block that has no MLP for it."""
    of_image, of_text = heads_for(
        parts.attend,
        Heads(attention.heads, attention.norm_q, attention.norm_k),
        Heads(attention.heads, attention.norm_added_q, attention.norm_added_k),
    )
    (image_qkv,) = readers([attention.to_q, attention.to_k, attention.to_v], undo=parts.undo)
    (text_qkv,) = readers([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], undo=parts.undo)
    image = Stream(
        qkv=image_qkv,
        heads=of_image,
        span=spans[0],
        out=attention.to_out[0],
        mlp=mlps[0],
        second=second,
        clips=clips[0],
    )
    text = Stream(
        qkv=text_qkv,
        heads=of_text,
        span=spans[1],
        out=attention.to_add_out if mlps[1] else None,
        mlp=mlps[1],
        clips=clips[1],
    )
    return image, text


class JointBlock:
    """Image [B, S, D] and text [B, T, D] attend to each other and go through their own MLPs.

    Where a call's context says how many `new` tokens the image has, those after them are `references`, with a
    modulation of their own. `image_first` is the order in which `Tokens` has image and text; `following` is the next
    joint block, whose first norms this one's last passes compute.
    """

    def __init__(
        self,
        image: Stream,
        text: Stream,
        *,
        index: int,
        parts: Parts,
        references: Stream | None = None,
        image_first: bool = False,
    ) -> None:
        self.image, self.references, self.text = image, references, text
        self.index, self.image_first = index, image_first
        self.attend, self.elementwise = parts.attend, parts.elementwise
        self.following: JointBlock | None = None
        self.lends = True  # whether it may leave its text to the next block that runs

    def __call__(self, state: State) -> State:
        context, modulation = state.context, state.context["modulation"]
        residual = None if context["control"] is None else context["control"][self.index]
        if isinstance(late := state.text, Late):
            state = replace(state, text=late.block.text_after(late))
        streams, xs = self._divided(state)
        ahead = ahead_for(state, self.index)
        normed = self._normed(xs, streams, modulation) if ahead is None else ahead.normed
        ys = self._attention(streams, normed, context["tokens"])
        norms: list[Any] = [None] * len(streams)
        goes_on = self.following is None or reaches(modulation, self.following.text.span)
        if residual is None and self.following is not None and goes_on:
            following, _ = self.following._divided(state)
            norms = [stream.norm(modulation) for stream in following]
        vectors = [tuple(modulation[stream.span]) for stream in streams]
        *of_images, of_text = zip(streams, xs, ys, norms, vectors, strict=True)
        made = [self._stream(*one) for one in of_images]
        # Where a cache may skip the next block, nothing is made for it.
        late = self.lends and not goes_on
        text, normed = (Late(self, xs[-1], ys[-1], vectors[-1]), None) if late else self._stream(*of_text)

        x = made[0][0] if len(made) == 1 else torch.cat([x for x, _ in made], dim=1)
        x = x if residual is None else x + residual
        ahead = norms[0] and Ahead(x, text, self.index + 1, None, (*(normed for _, normed in made), normed))
        return replace(state, x=x, text=text, ahead=ahead)

    def text_after(self, late: Late) -> torch.Tensor:
        """The text after this block, which left it to the next one that runs."""
        return self._stream(self.text, late.text, late.y, None, late.vectors)[0]

    def _divided(self, state: State) -> tuple[list[Stream], list[torch.Tensor]]:
        """The streams of this call, text last, and their tokens."""
        assert state.text is not None
        new = state.context.get("new")
        if new is None or self.references is None:
            return [self.image, self.text], [state.x, state.text]
        return [self.image, self.references, self.text], [state.x[:, :new], state.x[:, new:], state.text]

    def _normed(self, xs: Sequence[torch.Tensor], streams: Sequence[Stream], modulation: Any) -> tuple[Any, ...]:
        """All streams, normalised and modulated for attention."""
        pairs = zip(xs, streams, strict=True)
        return tuple(self.elementwise.norm(x, **stream.norm(modulation)) for x, stream in pairs)

    def _attention(self, streams: Sequence[Stream], normed: Sequence[Any], tokens: Tokens) -> list[Any]:
        """What each stream gets of it: [B, S_i, D], as rows or e4m3 heads."""
        # The text comes last here; in the joint sequence it may be the first.
        shift = 0 if self.image_first else 1
        products = [(stream.qkv(x), stream.heads) for stream, x in zip(streams, normed, strict=True)]
        ordered = products[-shift:] + products[:-shift] if shift else products
        shares = attend_jointly(ordered, tokens, attend=self.attend, elementwise=self.elementwise)
        return [*shares[shift:], *shares[:shift]]

    def _stream(
        self,
        stream: Stream,
        x: torch.Tensor,
        y: torch.Tensor | HeadScaled,
        ahead: dict[str, Any] | None,
        vectors: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, Any]:
        """One stream after attention's share `y`: residuals and MLP, and with `ahead` the next block's norm of it."""
        if stream.out is None:
            return x, None
        assert stream.mlp is not None
        elementwise, y = self.elementwise, projected(stream.out, y, dtype=x.dtype)
        _, _, gate, shift, scale, mlp_gate, *more = vectors
        norm = {"shift": shift, "scale": scale, **asks(stream.mlp.up)}
        if stream.second is not None:
            norm |= {"also": self._second(stream.second, x, *more[:2]), "also_gate": more[2]}
        x, normed = elementwise.residual_norm(x, y, gate=gate, **norm)
        y, normed = stream.mlp(normed, elementwise), None
        if ahead is None:
            x = elementwise.residual(x, y, gate=mlp_gate)
        else:
            x, normed = elementwise.residual_norm(x, y, gate=mlp_gate, **ahead)
        return clipped(x) if stream.clips else x, normed

    def _second(
        self, second: tuple[Stack, Heads, Any], x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """The stream's tokens among themselves, where a block has that too (SD 3.5 medium): [B, S, D]."""
        qkv, heads, out = second
        normed = self.elementwise.norm(x, shift=shift, scale=scale, **asks(qkv))
        y = attend_alone(qkv(normed), heads, Tokens(), attend=self.attend, elementwise=self.elementwise)
        return projected(out, y, dtype=x.dtype)


def signal(span: slice, parts: Parts, state: State) -> torch.Tensor:
    """The picture's tokens as the first block reads them, whose modulation lies at `span`: [B, S, D]."""
    shift, scale = state.context["modulation"][span][:2]
    return parts.elementwise.norm(state.x, shift=shift, scale=scale)


def epilogue(
    denoiser: Any, span: slice, parts: Parts, state: State, *, output: type[Any] = Transformer2DModelOutput
) -> Any:
    """The picture's tokens through the last norm, modulated by what lies at `span`, and the last projection."""
    scale, shift = state.context["modulation"][span]
    x = denoiser.proj_out(parts.elementwise.norm(state.x, shift=shift, scale=scale))
    return output(sample=x) if state.context["return_dict"] else (x,)
