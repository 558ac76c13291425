"""Attention put together from attentions over parts of the keys, each with its log-sum-exp; overlaps are subtracted.

softmax(q k^T) v over a union of key sets is the sum of e^lse out over them, divided by the sum of e^lse: what is in two
sets counts twice, and the attention over their overlap, with the sign -1, takes it out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import columns_of, tile

SCHEMA = "merge_heads(Tensor places, Tensor[] outs, Tensor[] lses, float[] signs, bool[] permuted) -> Tensor[]"


def merge_heads_ref(
    places: torch.Tensor,
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    signs: Sequence[float],
    permuted: Sequence[bool],
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    order = places.long()
    heads = [x[:, order] if moved else x for x, moved in zip(outs, permuted, strict=True)]
    sums = [x[:, order] if moved else x for x, moved in zip(lses, permuted, strict=True)]
    most = torch.stack(sums).amax(0)
    weights = [sign * (lse - most).exp() for sign, lse in zip(signs, sums, strict=True)]
    total = torch.stack(weights).sum(0)
    merged = torch.stack([w[..., None] * x.float() for w, x in zip(weights, heads, strict=True)]).sum(0)
    return [(merged / total[..., None]).to(outs[0].dtype)]


@jit(do_not_specialize=("tokens",))
def _merge_heads_kernel(
    places, outs, lses, signs, made, tokens,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, PERMUTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = columns_of(BLOCK)
    there = rows < tokens
    mask = there[:, None] & (columns < HEADS * DEPTH)[None, :]
    first = tl.program_id(1).to(tl.int64) * tokens
    moved = tl.load(places + rows, mask=there, other=0)

    # Twice over the log-sum-exps, which are small: the largest first, so that no exponential overflows.
    most = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        at = (first + (moved if PERMUTED[i] else rows))[:, None] * HEADS + (columns // DEPTH)[None, :]
        most = tl.maximum(most, tl.load(lses[i] + at, mask=mask, other=0.0))
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    merged = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        row = first + (moved if PERMUTED[i] else rows)
        lse = tl.load(lses[i] + row[:, None] * HEADS + (columns // DEPTH)[None, :], mask=mask, other=0.0)
        weight = signs[i] * tl.exp(lse - most)
        x = tl.load(outs[i] + row[:, None] * HEADS * DEPTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += weight
        merged += weight * x
    out = made + (first + rows)[:, None] * HEADS * DEPTH + columns[None, :]
    tl.store(out, (merged / total).to(made.dtype.element_ty), mask=mask)


def _launch(
    places: torch.Tensor,
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    signs: Sequence[float],
    permuted: Sequence[bool],
) -> list[torch.Tensor]:
    batch, tokens, heads, depth = outs[0].shape
    made = torch.empty_like(outs[0])
    rows, block, warps = tile(heads * depth)
    _merge_heads_kernel[(ceil_div(tokens, rows), batch)](
        places, tuple(outs), tuple(lses), tuple(map(float, signs)), made, tokens,
        HEADS=heads, DEPTH=depth, PARTS=len(outs), PERMUTED=tuple(map(bool, permuted)),
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return [made]


_op = register(SCHEMA, reference=merge_heads_ref, launch=_launch)


def merge_heads(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    *,
    signs: Sequence[float],
    permuted: Sequence[bool],
    places: torch.Tensor,
) -> torch.Tensor:
    """Attention [B, S, H, D] over the keys of every part: `outs` [B, S, H, D], `lses` [B, S, H] fp32, `signs` 1 or -1.

    Parts that are `permuted` have token s at `places[s]` ([S] int32). A part counts for nothing where its log-sum-exp
    is -inf. Raises ValueError where shapes differ or the lists do.
    """
    if not len(outs) == len(lses) == len(signs) == len(permuted):
        raise ValueError(f"as many of each, got {len(outs)}, {len(lses)}, {len(signs)}, {len(permuted)}")
    shape = outs[0].shape
    if any(out.shape != shape for out in outs) or any(lse.shape != shape[:3] for lse in lses):
        raise ValueError(f"every part must be {list(shape)}, its log-sum-exp {list(shape[:3])}")
    whole = [[x.contiguous() for x in parts] for parts in (outs, lses)]
    return _op(places, *whole, list(signs), list(permuted))[0]


def _make(draw: Draw, *, batch: int = 1, tokens: int, heads: int, depth: int, parts: int = 3) -> dict[str, Any]:
    lses = [draw(batch, tokens, heads, dtype=torch.float32) for _ in range(parts)]
    # What is subtracted is a part of what was added.
    lses[-1] = lses[0] - 1.0 - lses[-1].abs()
    return {
        "places": torch.arange(tokens, device=draw.device, dtype=torch.int32).flip(0),
        "outs": [draw(batch, tokens, heads, depth) for _ in range(parts)],
        "lses": lses,
        "signs": [1.0] * (parts - 1) + [-1.0],
        "permuted": [i % 2 == 1 for i in range(parts)],
    }


def _bytes(arguments: Any, results: list[torch.Tensor]) -> int:
    tensors = [*arguments["outs"], *arguments["lses"], arguments["places"], *results]
    return sum(t.numel() * t.element_size() for t in tensors)


KERNEL = Kernel(
    name="merge_heads",
    reference=merge_heads_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("three parts, odd length", {"batch": 2, "tokens": 37, "heads": 3, "depth": 64}),
        Case("five parts, head size 72", {"tokens": 5, "heads": 4, "depth": 72, "parts": 5}),
    ),
    bench=(Case("Wan 14B 832x480x81", {"tokens": 32760, "heads": 40, "depth": 128, "parts": 5}),),
    bytes_moved=_bytes,
)
