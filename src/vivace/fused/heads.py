"""From the products of q, k and v to attention's output, for one stream or several that attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from vivace.attention.backend import Attend
from vivace.fused.elementwise import Elementwise


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

    def norms(self) -> dict[str, Any]:
        """The norms as keywords of the arithmetic."""
        if self.norm_q is None:
            return {}
        return {"q_weight": self.norm_q.weight, "k_weight": self.norm_k.weight, "eps": self.norm_q.eps}


def attend_alone(
    qkv: torch.Tensor, heads: Heads, tokens: Tokens, *, attend: Attend, elementwise: Elementwise
) -> torch.Tensor:
    """Attention of one stream `[B, S, 3 D]` among its own tokens, `[B, S, D]`; v stays where the product left it."""
    parts = qkv.unflatten(-1, (3, heads.count, -1))
    q, k = (torch.empty(parts.shape[:2] + parts.shape[3:], device=qkv.device, dtype=qkv.dtype) for _ in range(2))
    elementwise.heads(qkv, q=q, k=k, cos=tokens.cos, sin=tokens.sin, **heads.norms())
    return _attended(q, k, parts[:, :, 2], tokens, attend)


def attend_jointly(
    streams: Sequence[tuple[torch.Tensor, Heads]], tokens: Tokens, *, attend: Attend, elementwise: Elementwise
) -> torch.Tensor:
    """Attention of several streams `[B, S_i, 3 D]` to each other, one after another: `[B, sum of S_i, D]`."""
    first, heads = streams[0]
    total, repeats = sum(qkv.shape[1] for qkv, _ in streams), tokens.repeats
    depth = first.shape[-1] // (3 * heads.count)
    q, k, v = (first.new_empty(len(first), total + more, heads.count, depth) for more in (0, repeats, repeats))
    offset = 0
    for qkv, heads in streams:
        end = offset + qkv.shape[1]
        cos, sin = (None if table is None else table[..., offset:end, :] for table in (tokens.cos, tokens.sin))
        elementwise.heads(qkv, q=q, k=k, v=v, cos=cos, sin=sin, offset=offset, **heads.norms())
        offset = end
    if repeats:
        k[:, total:], v[:, total:] = k[:, total - 1 : total], v[:, total - 1 : total]
    return _attended(q, k, v, tokens, attend)


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens, attend: Attend) -> torch.Tensor:
    if tokens.lengths is None:
        return attend(q, k, v, mask=tokens.mask).flatten(2)
    # The fastest kernels take no mask. Neighbours of one length go together, and what stands for no token stays 0.
    out, start = torch.zeros_like(q), 0
    for length, run in groupby(tokens.lengths):
        those = slice(start, start + len(list(run))), slice(length)
        out[those] = attend(q[those], k[those], v[those])
        start = those[0].stop
    return out.flatten(2)
