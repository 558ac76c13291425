"""What fp8 attention wrote, in 16 bit or as row-scaled 8-bit rows: e4m3 heads times the scale of each head's v."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import (
    FORMATS,
    HeadScaled,
    Quantize,
    RowScaled,
    limit_of,
    rows_ref,
    store_rows,
    tile,
)

SCHEMA = "unscale_heads(Tensor x, Tensor scale, ScalarType dtype, str? quantize) -> Tensor[]"


def unscale_heads_ref(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, quantize: str | None
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    return rows_ref((x.float() * scale[:, None, :, None]).flatten(2), dtype, quantize)


@jit(do_not_specialize=("tokens",))
def _unscale_heads_kernel(
    x, scale, out, row_scale, tokens, x_batch,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    mask = (rows < tokens)[:, None] & inside[None, :]
    at = x + batch * x_batch + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y = y * tl.load(scale + batch * (WIDTH // DEPTH) + columns // DEPTH, mask=inside, other=0.0)[None, :]
    store_rows(out, row_scale, batch * tokens, rows, columns, y, mask, tokens, WIDTH, LIMIT)


def _launch(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, quantize: str | None) -> list[torch.Tensor]:
    batch, tokens, heads, depth = x.shape
    width = heads * depth
    made = [torch.empty(batch, tokens, width, device=x.device, dtype=FORMATS[quantize].dtype if quantize else dtype)]
    if quantize:
        made.append(torch.empty(batch, tokens, FORMATS[quantize].factors, device=x.device, dtype=torch.float32))
    rows, block, warps = tile(width)
    _unscale_heads_kernel[(ceil_div(tokens, rows), batch)](
        x, scale, made[0], made[-1], tokens, x.stride(0),
        WIDTH=width, DEPTH=depth, LIMIT=limit_of(quantize), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=unscale_heads_ref, launch=_launch)


def unscale_heads(x: HeadScaled, *, dtype: torch.dtype, quantize: Quantize | None = None) -> torch.Tensor | RowScaled:
    """The heads as rows [B, S, H D]: in `dtype`, or as `RowScaled` values.

    The values may be some tokens of a longer sequence. Raises ValueError where a size does not fit, or a token's heads
    do not lie together.
    """
    values, scales = x
    batch, _, heads, depth = values.shape
    if values.stride()[1:] != (heads * depth, depth, 1) or scales.shape != (batch, heads) or not scales.is_contiguous():
        raise ValueError(
            f"a token's heads must lie together and scales be [{batch}, {heads}], got strides {values.stride()} and "
            f"scales {list(scales.shape)}"
        )
    made = _op(values, scales, dtype, quantize)
    return made[0] if quantize is None else RowScaled(*made)


def _make(
    draw: Draw, *, batch: int = 1, tokens: int, heads: int, depth: int, before: int = 0, quantize: str | None = None
) -> dict[str, Any]:
    """With `before` tokens of another stream in the same tensor."""
    x = (draw(batch, before + tokens, heads, depth, dtype=torch.float32) * 30).to(torch.float8_e4m3fn)[:, before:]
    scale = draw(batch, heads, dtype=torch.float32).abs() + 0.01
    return {"x": x, "scale": scale, "dtype": draw.dtype, "quantize": quantize}


KERNEL = Kernel(
    name="unscale_heads",
    reference=unscale_heads_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("in 16 bit, odd length", {"batch": 2, "tokens": 37, "heads": 3, "depth": 64}),
        Case("fp8 rows, head size 72", {"batch": 2, "tokens": 5, "heads": 4, "depth": 72, "quantize": "fp8"}),
        Case("fp8 rows after text", {"batch": 2, "tokens": 5, "heads": 4, "depth": 64, "before": 3, "quantize": "fp8"}),
        Case("int8 rows", {"tokens": 5, "heads": 2, "depth": 128, "quantize": "int8"}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4608, "heads": 24, "depth": 128}),
        Case("FLUX 1024² fp8", {"tokens": 4608, "heads": 24, "depth": 128, "quantize": "fp8"}),
    ),
    since=89,
)
