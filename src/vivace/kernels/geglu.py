"""`a * activation(b)` for a row that holds a and b side by side: GEGLU (UNets), SwiGLU."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.activate import Activation, activation, activation_ref
from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import (
    Quantize,
    RowScaled,
    limit_of,
    rows_like,
    rows_ref,
    shaped,
    store_rows,
    tile,
    tokens_of,
)

SCHEMA = "geglu(Tensor x, str kind, str? quantize) -> Tensor[]"


def geglu_ref(x: torch.Tensor, kind: str, quantize: str | None) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    a, b = x.float().chunk(2, dim=-1)
    return rows_ref(a * activation_ref(b, kind), x.dtype, quantize)


@jit(do_not_specialize=("tokens",))
def _geglu_kernel(
    x, out, row_scale, tokens, width, x_batch, x_token,
    KIND: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < tokens)[:, None] & (columns < width)[None, :]

    at = batch * x_batch + rows.to(tl.int64)[:, None] * x_token + columns[None, :]
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + width + at, mask=mask, other=0.0).to(tl.float32)
    y = a * activation(b, KIND)
    store_rows(out, row_scale, batch * tokens, rows, columns, y, mask, tokens, width, LIMIT)


def _launch(x: torch.Tensor, kind: str, quantize: str | None) -> list[torch.Tensor]:
    batch, tokens, width = x.shape[0], x.shape[1], x.shape[2] // 2
    made = rows_like(x, quantize, width=width)
    rows, block, warps = tile(width) if quantize else tile(width, most=1024)
    _geglu_kernel[(ceil_div(tokens, rows) * ceil_div(width, block), batch)](
        x, made[0], made[-1], tokens, width, x.stride(0), x.stride(1),
        KIND=kind, LIMIT=limit_of(quantize), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=geglu_ref, launch=_launch)


def geglu(x: torch.Tensor, *, kind: Activation = "gelu", quantize: Quantize | None = None) -> torch.Tensor | RowScaled:
    """`x[..., :D] * activation(x[..., D:])` for `x` of [B, S, 2 D] (or [S, 2 D]) with contiguous rows.

    Returns [B, S, D] in x's type, or as `RowScaled`. Raises ValueError for an odd last dimension.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"geglu halves the last dimension of x, which must be even; got {tuple(x.shape)}")
    return shaped(_op(tokens_of(x, "x"), kind, quantize), x)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    width: int,
    kind: str = "gelu",
    quantize: str | None = None,
    pad: int = 0,
) -> dict[str, Any]:
    return {"x": draw(batch, tokens, 2 * width, pad=pad), "kind": kind, "quantize": quantize}


KERNEL = Kernel(
    name="geglu",
    reference=geglu_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, two samples", {"batch": 2, "tokens": 37, "width": 768}),
        Case("silu, a view of wider rows", {"batch": 2, "tokens": 3, "width": 2560, "kind": "silu", "pad": 64}),
        Case("width not a multiple of 16", {"tokens": 5, "width": 1155}),
        Case("fp8 rows", {"batch": 2, "tokens": 3, "width": 1280, "quantize": "fp8"}),
        Case("int8 rows", {"batch": 2, "tokens": 7, "width": 768, "quantize": "int8"}),
    ),
    bench=(
        Case("SDXL 640 b2", {"batch": 2, "tokens": 4096, "width": 2560}),
        Case("SDXL 1280 b2", {"batch": 2, "tokens": 1024, "width": 5120}),
        Case("SDXL 640 b2 fp8", {"batch": 2, "tokens": 4096, "width": 2560, "quantize": "fp8"}),
        Case("SD1.5 320 b2", {"batch": 2, "tokens": 4096, "width": 1280}),
    ),
)
