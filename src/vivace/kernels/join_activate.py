"""Rows of `a` and of `activation(b)` (times `c`) side by side, plain or row-scaled: the way into a joint product."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.activate import Activation, activation, activation_ref
from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, power_of_two, tl
from vivace.kernels.row import (
    E4M3_LIMIT,
    HeadScaled,
    Quantize,
    RowScaled,
    columns_of,
    extremes,
    factors,
    limit_of,
    rows_like,
    rows_ref,
    scaled,
    shaped,
    store_factors,
    tile,
    tokens_of,
)

SCHEMA = "join_activate(Tensor a, Tensor? a_scale, Tensor b, Tensor? c, str kind, str? quantize) -> Tensor[]"


def join_activate_ref(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    c: torch.Tensor | None,
    kind: str,
    quantize: str | None,
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    x, y = a.float(), activation_ref(b.float(), kind)
    x = x if a_scale is None else HeadScaled(x.unflatten(-1, (a_scale.shape[1], -1)), a_scale).dense()
    return rows_ref(torch.cat((x, y if c is None else y * c.float()), -1), b.dtype, quantize)


@jit(do_not_specialize=("tokens",))
def _join_activate_kernel(
    a, a_scale, b, c, out, row_scale, tokens,
    a_batch, a_token, b_batch, b_token, c_batch, c_token,
    A_WIDTH: tl.constexpr, B_WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    KIND: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, far = (rows < tokens)[:, None], rows.to(tl.int64)[:, None]

    # Each half has a tile of its own: in one over both, every thread would load for either half, and mask one away.
    columns = columns_of(A_BLOCK)
    a_mask = there & (columns < A_WIDTH)[None, :]
    x = tl.load(a + batch * a_batch + far * a_token + columns[None, :], mask=a_mask, other=0.0).to(tl.float32)
    if a_scale is not None:
        scales = a_scale + batch * (A_WIDTH // DEPTH) + columns // DEPTH
        x = x * tl.load(scales, mask=columns < A_WIDTH, other=0.0)[None, :]
    x_out = columns[None, :]

    columns = columns_of(B_BLOCK)
    b_mask = there & (columns < B_WIDTH)[None, :]
    y = tl.load(b + batch * b_batch + far * b_token + columns[None, :], mask=b_mask, other=0.0).to(tl.float32)
    y = activation(y, KIND, LIMIT == E4M3_LIMIT)
    if c is not None:
        at = c + batch * c_batch + far * c_token + columns[None, :]
        y = y * tl.load(at, mask=b_mask, other=0.0).to(tl.float32)
    y_out = A_WIDTH + columns[None, :]

    kind: tl.constexpr = out.dtype.element_ty
    first = batch * tokens
    if LIMIT > 0:
        x_low, x_high = extremes(x, a_mask, kind)
        y_low, y_high = extremes(y, b_mask, kind)
        low = tl.minimum(x_low, y_low, tl.PropagateNan.ALL)
        scale, offset = factors(low, tl.maximum(x_high, y_high), kind, LIMIT)
        store_factors(row_scale, first, rows, scale, offset, tokens, kind)
        x, y = scaled(x, a_mask, scale, offset, kind), scaled(y, b_mask, scale, offset, kind)
    out += (first + rows)[:, None] * (A_WIDTH + B_WIDTH)
    tl.store(out + x_out, x.to(kind), mask=a_mask)
    tl.store(out + y_out, y.to(kind), mask=b_mask)


def _launch(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    c: torch.Tensor | None,
    kind: str,
    quantize: str | None,
) -> list[torch.Tensor]:
    batch, tokens, a_width = a.shape
    b_width = b.shape[-1]
    made = rows_like(b, quantize, width=a_width + b_width)
    rows, _, warps = tile(a_width + b_width)
    _join_activate_kernel[(ceil_div(tokens, rows), batch)](
        a, a_scale, b, c, made[0], made[-1], tokens,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        *((0, 0) if c is None else c.stride()[:2]),
        A_WIDTH=a_width, B_WIDTH=b_width,
        # A constant, because a division by one is a shift.
        DEPTH=1 if a_scale is None else a_width // a_scale.shape[1],
        KIND=kind, LIMIT=limit_of(quantize), ROWS=rows, num_warps=warps,
        A_BLOCK=power_of_two(a_width), B_BLOCK=power_of_two(b_width),
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=join_activate_ref, launch=_launch)


def join_activate(
    a: torch.Tensor | HeadScaled,
    b: torch.Tensor,
    *,
    times: torch.Tensor | None = None,
    kind: Activation = "gelu_tanh",
    quantize: Quantize | None = None,
) -> torch.Tensor | RowScaled:
    """`cat(a, activation(b) * times)` of [B, S, D] and [B, S, E] with contiguous rows: [B, S, D + E], or `RowScaled`.

    `a` may be attention's heads in e4m3. Raises ValueError where the leading dimensions or the types differ, or `times`
    is not of b's shape.
    """
    a, scales = (a.values.flatten(2), a.scales) if isinstance(a, HeadScaled) else (a, None)
    if a.shape[:-1] != b.shape[:-1] or (scales is None and a.dtype != b.dtype):
        raise ValueError(f"a and b must agree but for their last dimension, got {list(a.shape)} and {list(b.shape)}")
    if times is not None and times.shape != b.shape:
        raise ValueError(f"times must be of b's shape {list(b.shape)}, got {list(times.shape)}")
    c = None if times is None else tokens_of(times, "times")
    return shaped(_op(tokens_of(a, "a"), scales, tokens_of(b, "b"), c, kind, quantize), b)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    widths: tuple[int, int],
    kind: str = "gelu_tanh",
    gated: bool = False,
    heads: int | None = None,
    quantize: str | None = None,
    pad: int = 0,
) -> dict[str, Any]:
    """With a number of `heads`, `a` in e4m3."""
    a, b = (draw(batch, tokens, width, pad=pad) for width in widths)
    c = draw(batch, tokens, widths[1], pad=2 * pad) if gated else None
    scales = None if heads is None else draw(batch, heads, dtype=torch.float32).abs() + 0.1
    a = a if heads is None else a.to(torch.float8_e4m3fn)
    return {"a": a, "a_scale": scales, "b": b, "c": c, "kind": kind, "quantize": quantize}


KERNEL = Kernel(
    name="join_activate",
    reference=join_activate_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, views", {"batch": 2, "tokens": 7, "widths": (192, 768), "pad": 64}),
        Case("silu, odd widths", {"tokens": 5, "widths": (77, 300), "kind": "silu"}),
        Case("swiglu, views", {"batch": 2, "tokens": 5, "widths": (64, 192), "kind": "silu", "gated": True, "pad": 32}),
        Case("fp8 rows", {"batch": 2, "tokens": 3, "widths": (320, 1280), "quantize": "fp8"}),
        Case("int8 rows", {"tokens": 3, "widths": (64, 256), "quantize": "int8"}),
        Case("fp8 heads", {"batch": 2, "tokens": 3, "widths": (96, 256), "heads": 3}),
        Case("fp8 heads to fp8 rows", {"batch": 2, "tokens": 5, "widths": (192, 320), "heads": 2, "quantize": "fp8"}),
    ),
    bench=(
        Case("FLUX 1024² single", {"tokens": 4608, "widths": (3072, 12288)}),
        Case(
            "FLUX.2 1024² single, fp8",
            {"tokens": 4608, "widths": (6144, 18432), "kind": "silu", "gated": True, "quantize": "fp8"},
        ),
        Case("FLUX 1024² single, fp8", {"tokens": 4608, "widths": (3072, 12288), "quantize": "fp8"}),
        Case(
            "FLUX 1024² single, fp8 heads",
            {"tokens": 4608, "widths": (3072, 12288), "heads": 24, "quantize": "fp8"},
        ),
    ),
)
