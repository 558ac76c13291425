"""Joint blocks: a stream each for picture and text, which attend to each other (MM-DiT, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from vivace.attention.backend import Attend
from vivace.family import Block, State
from vivace.fused.elementwise import Elementwise
from vivace.fused.heads import Heads, Tokens, attend_alone, attend_jointly
from vivace.fused.stack import Stack, takes

HALF = torch.finfo(torch.float16).max


class Ahead(NamedTuple):
    """What a block computed for the one after it, out of the streams `x` and `text`."""

    x: torch.Tensor
    text: torch.Tensor | None
    reader: int  # index of the block it is for
    joint: torch.Tensor | None  # [B, T + S, D], of which x and text are views
    normed: tuple[Any, ...]  # the streams, or the joint one, normalised and modulated for that block


def ahead_for(state: State, reader: int) -> Ahead | None:
    """What was computed ahead for block `reader`, unless the streams were changed since (a cache, a ControlNet)."""
    ahead = state.ahead
    if ahead is None or ahead.reader != reader or ahead.x is not state.x or ahead.text is not state.text:
        return None
    return ahead


def clipped(x: torch.Tensor) -> torch.Tensor:
    """`x`, in float16 without infinities, as the stock blocks keep it."""
    return x.clamp_(-HALF, HALF) if x.dtype == torch.float16 else x


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every block is built with."""

    attend: Attend
    elementwise: Elementwise
    undo: ExitStack


def chained(name: str, modules: Iterable[torch.nn.Module], forwards: Sequence[Any]) -> tuple[Block, ...]:
    """The blocks of the denoiser's list `name`, each of which prepares the first norm of the next one."""
    for one, following in pairwise(forwards):
        one.following = following
    pairs = zip(modules, forwards, strict=True)
    return tuple(Block(name=f"{name}.{i}", module=module, forward=one) for i, (module, one) in enumerate(pairs))


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Up, GELU (tanh) and down; where it is `gated`, the SiLU of up's first half times the second (SwiGLU)."""

    up: Any
    down: Any
    gated: bool = False

    @classmethod
    def of(cls, feed_forward: Any) -> Mlp:
        """That of diffusers' FeedForward module."""
        return cls(up=feed_forward.net[0].proj, down=feed_forward.net[2])

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
        return {"shift": shift, "scale": scale, "quantize": takes(self.qkv)}


def streams_of(
    attention: Any,
    *,
    spans: tuple[slice, slice],
    mlps: tuple[Mlp, Mlp | None],
    undo: ExitStack,
    second: Any = None,
    clips: tuple[bool, bool] = (False, False),
) -> tuple[Stream, Stream]:
    """Image and text of a block with diffusers' joint attention; the text ends with a block that has no MLP for it."""
    image = Stream(
        qkv=Stack([attention.to_q, attention.to_k, attention.to_v], undo=undo),
        heads=Heads(attention.heads, attention.norm_q, attention.norm_k),
        span=spans[0],
        out=attention.to_out[0],
        mlp=mlps[0],
        second=second,
        clips=clips[0],
    )
    text = Stream(
        qkv=Stack([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], undo=undo),
        heads=Heads(attention.heads, attention.norm_added_q, attention.norm_added_k),
        span=spans[1],
        out=attention.to_add_out if mlps[1] else None,
        mlp=mlps[1],
        clips=clips[1],
    )
    return image, text


class JointBlock:
    """Image [B, S, D] and text [B, T, D] attend to each other and go through their own MLPs.

    `image_first` is the order in which `Tokens` has them; `following` is the next joint block, whose first norms this
    one's last passes compute.
    """

    def __init__(self, image: Stream, text: Stream, *, index: int, parts: Parts, image_first: bool = False) -> None:
        self.image, self.text, self.index, self.image_first = image, text, index, image_first
        self.attend, self.elementwise = parts.attend, parts.elementwise
        self.following: JointBlock | None = None

    def __call__(self, state: State) -> State:
        modulation, control = state.context["modulation"], state.context["control"]
        residual = None if control is None else control[self.index]
        x, text = state.x, state.text
        assert text is not None
        y, text_y = self._attention(self._normed(state, modulation), state.context["tokens"])
        second = self._second(x, modulation)
        image_ahead, text_ahead = None, None
        if residual is None and self.following is not None:
            image_ahead, text_ahead = self.following.norms(modulation)

        x, image_normed = self._stream(self.image, x, y, modulation, ahead=image_ahead, second=second)
        text_normed = None
        if self.text.out is not None:
            text, text_normed = self._stream(self.text, text, text_y, modulation, ahead=text_ahead)
        x = x if residual is None else x + residual
        ahead = image_ahead and Ahead(x, text, self.index + 1, None, (image_normed, text_normed))
        return replace(state, x=x, text=text, ahead=ahead)

    def norms(self, modulation: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
        """The first norm of image and text, as keywords of the arithmetic."""
        return [self.image.norm(modulation), self.text.norm(modulation)]

    def _normed(self, state: State, modulation: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Both streams, normalised and modulated for attention."""
        ahead = ahead_for(state, self.index)
        if ahead is not None:
            return ahead.normed
        streams = zip((state.x, state.text), self.norms(modulation), strict=True)
        return tuple(self.elementwise.norm(x, **norm) for x, norm in streams)

    def _attention(self, normed: tuple[Any, ...], tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """What the image [B, S, D] and the text [B, T, D] get of it."""
        pairs = zip((self.image, self.text), normed, strict=True)
        streams = [(stream.qkv(x), stream.heads) for stream, x in pairs]
        ordered = streams if self.image_first else streams[::-1]
        both = attend_jointly(ordered, tokens, attend=self.attend, elementwise=self.elementwise)
        first = ordered[0][0].shape[1]
        start, end = both[:, :first], both[:, first:]
        return (start, end) if self.image_first else (end, start)

    def _second(self, x: torch.Tensor, modulation: Sequence[torch.Tensor]) -> tuple[Any, Any] | None:
        """The image tokens among themselves, where a block has that too (SD 3.5 medium): [B, S, D], and its gate."""
        if self.image.second is None:
            return None
        qkv, heads, out = self.image.second
        shift, scale, gate = modulation[self.image.span][6:]
        normed = self.elementwise.norm(x, shift=shift, scale=scale, quantize=takes(qkv))
        y = attend_alone(qkv(normed), heads, Tokens(), attend=self.attend, elementwise=self.elementwise)
        return out(y), gate

    def _stream(
        self, stream: Stream, x: torch.Tensor, y: torch.Tensor, modulation: Any, *, ahead: Any, second: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """One stream after attention's share `y`: residuals and MLP, and with `ahead` the next block's norm of it."""
        assert stream.out is not None
        assert stream.mlp is not None
        elementwise, y = self.elementwise, stream.out(y)
        _, _, gate, shift, scale, mlp_gate = modulation[stream.span][:6]
        if second is not None:
            x = elementwise.residual(x, y, gate=gate)
            y, gate = second
        x, normed = elementwise.residual_norm(x, y, gate=gate, shift=shift, scale=scale, quantize=takes(stream.mlp.up))
        y, normed = stream.mlp(normed, elementwise), None
        if ahead is None:
            x = elementwise.residual(x, y, gate=mlp_gate)
        else:
            x, normed = elementwise.residual_norm(x, y, gate=mlp_gate, **ahead)
        return clipped(x) if stream.clips else x, normed
