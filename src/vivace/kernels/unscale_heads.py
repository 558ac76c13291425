"""What fp8 attention wrote, in 16 bit or as row-scaled 8-bit rows: e4m3 heads times the scale of each head's v."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import FORMATS, Quantize, RowScaled, limit_of, rows_ref, shaped, store_rows, tile

SCHEMA = "unscale_heads(Tensor x, Tensor scale, ScalarType dtype, str? quantize) -> Tensor[]"


def unscale_heads_ref(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, quantize: str | None
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    return rows_ref((x.float() * scale[:, None, :, None]).flatten(2), dtype, quantize)


@jit(do_not_specialize=("tokens",))
def _unscale_heads_kernel(
    x, scale, out, row_scale, tokens, width, heads, depth, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    mask = (rows < tokens)[:, None] & inside[None, :]
    first = batch * tokens
    y = tl.load(x + (first + rows)[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = y * tl.load(scale + batch * heads + columns // depth, mask=inside, other=0.0)[None, :]
    store_rows(out, row_scale, first, rows, columns, y, mask, tokens, width, LIMIT)


def _launch(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, quantize: str | None) -> list[torch.Tensor]:
    batch, tokens, heads, depth = x.shape
    width = heads * depth
    made = [torch.empty(batch, tokens, width, device=x.device, dtype=FORMATS[quantize].dtype if quantize else dtype)]
    if quantize:
        made.append(torch.empty(batch, tokens, FORMATS[quantize].factors, device=x.device, dtype=torch.float32))
    rows, block, warps = tile(width)
    _unscale_heads_kernel[(ceil_div(tokens, rows), batch)](
        x, scale, made[0], made[-1], tokens, width, heads, depth,
        LIMIT=limit_of(quantize), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=unscale_heads_ref, launch=_launch)


def unscale_heads(
    x: torch.Tensor, *, scale: torch.Tensor, dtype: torch.dtype, quantize: Quantize | None = None
) -> torch.Tensor | RowScaled:
    """`x * scale` of e4m3 heads [B, S, H, D], contiguous, and `scale` [B, H] fp32: rows [B, S, H D].

    In `dtype`, or as `RowScaled` values. Raises ValueError where a size does not fit.
    """
    if not x.is_contiguous() or scale.shape != (x.shape[0], x.shape[2]) or not scale.is_contiguous():
        raise ValueError(f"x must be contiguous and scale [{x.shape[0]}, {x.shape[2]}], got {list(scale.shape)}")
    return shaped(_op(x, scale, dtype, quantize), x.flatten(2))


def _make(
    draw: Draw, *, batch: int = 1, tokens: int, heads: int, depth: int, quantize: str | None = None
) -> dict[str, Any]:
    x = (draw(batch, tokens, heads, depth, dtype=torch.float32) * 30).to(torch.float8_e4m3fn)
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
        Case("int8 rows", {"tokens": 5, "heads": 2, "depth": 128, "quantize": "int8"}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4608, "heads": 24, "depth": 128}),
        Case("FLUX 1024² fp8", {"tokens": 4608, "heads": 24, "depth": 128, "quantize": "fp8"}),
    ),
    since=89,
)
