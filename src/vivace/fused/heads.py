"""From the products of q, k and v to attention's output, for one stream or several that attend to each other.

Where attention computes in e4m3 and the norms bound q and k, they are written so, and the output stays so until the
linear that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from vivace.attention.backend import Attend
from vivace.attention.packed import Operands, Packed
from vivace.fused.elementwise import Elementwise
from vivace.fused.packed_norms import PackedNorms, packed_norms
from vivace.fused.stack import takes
from vivace.kernels.quant_heads import quant_heads
from vivace.kernels.row import HeadScaled
from vivace.kernels.unscale_heads import unscale_heads
from vivace.lora.side import plain, side_of

SMALLEST = 1e-14
"""The scale of a head of v that is all zeros."""


SEVERAL = 8
"""Samples up to which a product for each costs less than a copy of their rows."""


class Tokens(NamedTuple):
    """What attention has to know of a sequence's tokens: where they are, and which count as keys."""

    cos: torch.Tensor | None = None  # [S, D / 2], or [B, S, D / 2]: the rotary angles of each
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None  # [B or 1, 1, 1, S], as `Attend` takes it
    repeats: int = 0  # how often the last token counts once more
    lengths: tuple[int, ...] | None = None  # of each sample, where only its first tokens count


class Heads(NamedTuple):
    """The heads of one stream, and the RMSNorm modules of its q and k (None: none)."""

    count: int
    norm_q: Any
    norm_k: Any
    packed: PackedNorms | None = None  # None: q and k are left in 16 bit

    def norms(self, *, packed: bool) -> dict[str, Any]:
        """The norms as keywords of the arithmetic."""
        if self.norm_q is None:
            return {}
        q, k = self.packed[:2] if packed and self.packed else (self.norm_q.weight, self.norm_k.weight)
        return {"q_weight": q, "k_weight": k, "eps": self.norm_q.eps}


def heads_for(attend: Attend, *streams: Heads) -> list[Heads]:
    """The heads of `streams` that are attended to together, ready for e4m3 where `attend` and their norms allow it."""
    if not (isinstance(attend, Packed) and attend.scales_only) or any(one.norm_q is None for one in streams):
        return list(streams)
    norms = packed_norms([(one.norm_q.weight, one.norm_k.weight) for one in streams])
    return [one._replace(packed=packed) for one, packed in zip(streams, norms, strict=True)]


def attend_alone(
    qkv: torch.Tensor, heads: Heads, tokens: Tokens, *, attend: Attend, elementwise: Elementwise
) -> torch.Tensor | HeadScaled:
    """Attention of one stream `[B, S, 3 D]` among its own tokens, `[B, S, D]`; v stays where the product left it."""
    v = qkv.unflatten(-1, (3, heads.count, -1))[:, :, 2]
    scales = _scales(v, heads, tokens, attend, keys=v.shape[1])
    q, k = (torch.empty(v.shape, device=v.device, dtype=_dtype(v, scales)) for _ in range(2))
    norms = heads.norms(packed=scales is not None)
    elementwise.heads(qkv, q=q, k=k, v_scale=scales, cos=tokens.cos, sin=tokens.sin, **norms)
    return _attended(q, k, v, scales, heads, tokens, attend)


def attend_jointly(
    streams: Sequence[tuple[torch.Tensor, Heads]], tokens: Tokens, *, attend: Attend, elementwise: Elementwise
) -> list[torch.Tensor] | list[HeadScaled]:
    """Attention of several streams `[B, S_i, 3 D]` to each other, one after another: what each gets, `[B, S_i, D]`."""
    first, heads = streams[0]
    lengths, repeats = [qkv.shape[1] for qkv, _ in streams], tokens.repeats
    total, depth = sum(lengths), first.shape[-1] // (3 * heads.count)
    v = first.new_empty(len(first), total + repeats, heads.count, depth)
    scales = _scales(v, heads, tokens, attend, keys=total + repeats)
    q, k = (v.new_empty(len(v), total + more, *v.shape[2:], dtype=_dtype(v, scales)) for more in (0, repeats))
    offset = 0
    for qkv, heads in streams:
        end = offset + qkv.shape[1]
        cos, sin = (None if table is None else table[..., offset:end, :] for table in (tokens.cos, tokens.sin))
        norms = heads.norms(packed=scales is not None)
        elementwise.heads(qkv, q=q, k=k, v=v, v_scale=scales, cos=cos, sin=sin, offset=offset, **norms)
        offset = end
    if repeats:
        k[:, total:], v[:, total:] = k[:, total - 1 : total], v[:, total - 1 : total]
    y = _attended(q, k, v, scales, heads, tokens, attend)
    if isinstance(y, HeadScaled):
        return [HeadScaled(values, y.scales) for values in y.values.split(lengths, dim=1)]
    return list(y.split(lengths, dim=1))


def attended(
    attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None = None
) -> torch.Tensor | HeadScaled:
    """Attention of q, k, v `[B, S, H, D]` as rows `[B, S, H D]`, or as e4m3 heads where it makes them."""
    if isinstance(attend, Packed) and attend.serves(keys=k.shape[1], depth=k.shape[-1], mask=mask):
        return attend.heads(attend.pack(q, k, v))
    return attend(q, k, v, mask=mask).flatten(2)


def projected(out: Any, y: torch.Tensor | HeadScaled, *, dtype: torch.dtype) -> torch.Tensor:
    """The projection `out` of what attention made; e4m3 heads go in as the rows that it takes, else in `dtype`."""
    if isinstance(y, HeadScaled):
        return out(unscale_heads(y, dtype=dtype, quantize=takes(out)))
    several = len(y) <= SEVERAL and not y.is_contiguous()
    if not several or not plain(out) or out.bias is None or torch.is_grad_enabled():
        return out(y)
    # Of rows that lie apart, as one stream's in a joint batch, torch makes a copy, and adds the bias in a second pass.
    made = y.new_empty(*y.shape[:-1], out.out_features)
    for sample, rows in zip(y, made, strict=True):
        torch.addmm(out.bias, sample, out.weight.t(), out=rows)
    if (side := side_of(out)) is not None:
        side.add_to(made, y)
    return made


def _scales(v: torch.Tensor, heads: Heads, tokens: Tokens, attend: Attend, *, keys: int) -> torch.Tensor | None:
    """Space for the scales of v [B, H], where q, k and v are to be in e4m3; else None."""
    if not isinstance(attend, Packed) or heads.packed is None or tokens.lengths is not None:
        return None
    if not attend.serves(keys=keys, depth=v.shape[-1], mask=tokens.mask):
        return None
    return torch.full((len(v), heads.count), SMALLEST, device=v.device)


def _dtype(v: torch.Tensor, scales: torch.Tensor | None) -> torch.dtype:
    return v.dtype if scales is None else torch.float8_e4m3fn


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: torch.Tensor | None,
    heads: Heads,
    tokens: Tokens,
    attend: Attend,
) -> torch.Tensor | HeadScaled:
    if scales is not None and isinstance(attend, Packed) and heads.packed is not None:
        descale = heads.packed.descale
        return attend.heads(Operands(q, k, HeadScaled(quant_heads(v, scale=scales), scales), descale))
    if tokens.lengths is None:
        return attended(attend, q, k, v, mask=tokens.mask)
    # The fastest kernels take no mask. Neighbours of one length go together, and what stands for no token stays 0.
    out, start = torch.zeros_like(q), 0
    for length, run in groupby(tokens.lengths):
        those = slice(start, start + len(list(run))), slice(length)
        out[those] = attend(q[those], k[those], v[those])
        start = those[0].stop
    return out.flatten(2)
