"""Row-scaled 8-bit rows of a tensor that no kernel of ours produced: attention's output."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import (
    Quantize,
    RowScaled,
    columns_of,
    limit_of,
    rows_like,
    rows_ref,
    store_rows,
    tile,
    tokens_of,
)

SCHEMA = "quant_rows(Tensor x, str quantize) -> Tensor[]"


def quant_rows_ref(x: torch.Tensor, quantize: str) -> list[torch.Tensor]:
    """The operation in torch."""
    return rows_ref(x.float(), x.dtype, quantize)


@jit(do_not_specialize=("tokens",))
def _quant_rows_kernel(
    x, out, row_scale, tokens, x_batch, x_token,
    WIDTH: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = columns_of(BLOCK)
    mask = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]
    at = batch * x_batch + rows.to(tl.int64)[:, None] * x_token + columns[None, :]
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    store_rows(out, row_scale, batch * tokens, rows, columns, y, mask, tokens, WIDTH, LIMIT)


def _launch(x: torch.Tensor, quantize: str) -> list[torch.Tensor]:
    batch, tokens, width = x.shape
    made = rows_like(x, quantize)
    rows, block, warps = tile(width)
    _quant_rows_kernel[(ceil_div(tokens, rows), batch)](
        x, made[0], made[1], tokens, x.stride(0), x.stride(1),
        WIDTH=width, LIMIT=limit_of(quantize), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=quant_rows_ref, launch=_launch)


def quant_rows(x: torch.Tensor, *, quantize: Quantize) -> RowScaled:
    """`x` [B, S, D] (or [S, D]) with contiguous rows as 8-bit values and a row's scale, or scale and offset."""
    values, scales = _op(tokens_of(x, "x"), quantize)
    return RowScaled(values.view(x.shape), scales.view(*x.shape[:-1], -1))


def _make(draw: Draw, *, batch: int = 1, tokens: int, width: int, quantize: str, pad: int = 0) -> dict[str, Any]:
    return {"x": draw(batch, tokens, width, pad=pad), "quantize": quantize}


KERNEL = Kernel(
    name="quant_rows",
    reference=quant_rows_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("fp8, odd length", {"batch": 2, "tokens": 37, "width": 192, "quantize": "fp8"}),
        Case("int8, a view of wider rows", {"batch": 2, "tokens": 3, "width": 3072, "quantize": "int8", "pad": 64}),
        Case("int8, width not a multiple of 16", {"tokens": 5, "width": 1155, "quantize": "int8"}),
    ),
    bench=(
        Case("FLUX 1024² fp8", {"tokens": 4608, "width": 3072, "quantize": "fp8"}),
        Case("SDXL 640 b2 int8", {"batch": 2, "tokens": 4096, "width": 640, "quantize": "int8"}),
    ),
)
