"""A linear of an int8 weight for a few rows in 16 bit: what it costs is reading the weight, at one byte an element."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl

SCHEMA = "few_rows_linear(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor[]"
MOST = 8
"""Rows from which on a product on tensor cores, with the weight unpacked for it, is no slower."""

# A warp reads a line of 512 bytes, and a thread has four such loads under way.
COLUMNS, DEPTH, WARPS = 32, 512, 8


def few_rows_linear_ref(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    y = x.float() @ values.float().t() * scales.t()
    return [(y if bias is None else y + bias.float()).to(x.dtype)]


@jit
def _as_float(bytes):
    """int8 to float32: a byte in the last place of 2^23 is a float at once, where a conversion has a quarter's rate."""
    return ((bytes.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@jit
def _store_row(out, bias, y, columns, inside):
    if bias is not None:
        y = y + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + columns, y.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("height",))
def _few_rows_linear_kernel(
    x, values, scales, bias, out, height, width, depth, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    # Programs that read the same part of the weight for other rows run together, and find it in the cache.
    pairs = tl.cdiv(height, 2)
    row = tl.program_id(0) % pairs * 2
    columns = (tl.program_id(0) // pairs).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    steps = tl.arange(0, DEPTH)
    one = tl.zeros((COLUMNS,), tl.float32)
    two = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, depth, DEPTH):
        left = steps < depth - start
        mask = inside[:, None] & left[None, :]
        weight = _as_float(tl.load(values + columns[:, None] * depth + start + steps[None, :], mask=mask, other=0))
        at = x + row * depth + start + steps
        one += tl.sum(weight * tl.load(at, mask=left, other=0.0).to(tl.float32)[None, :], 1)
        if row + 1 < height:
            two += tl.sum(weight * tl.load(at + depth, mask=left, other=0.0).to(tl.float32)[None, :], 1)
    scale = tl.load(scales + columns, mask=inside, other=0.0)
    at = out + row.to(tl.int64) * width
    _store_row(at, bias, one * scale, columns, inside)
    if row + 1 < height:
        _store_row(at + width, bias, two * scale, columns, inside)


def _launch(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> list[torch.Tensor]:
    (height, depth), width = x.shape, values.shape[0]
    out = torch.empty(height, width, device=x.device, dtype=x.dtype)
    _few_rows_linear_kernel[(ceil_div(height, 2) * ceil_div(width, COLUMNS),)](
        x, values, scales, bias, out, height, width, depth, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=WARPS
    )
    return [out]


_op = register(SCHEMA, reference=few_rows_linear_ref, launch=_launch)


def few_rows_linear(
    x: torch.Tensor, values: torch.Tensor, *, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[M, N] in x's type of a few rows `x` [M, K] and `values` [N, K] int8, contiguous, with `scales` [N, 1] fp32.

    A row's result does not depend on the rows beside it. Raises ValueError where the sizes do not fit.
    """
    if x.ndim != 2 or x.shape[1] != values.shape[1] or scales.shape != (len(values), 1):
        raise ValueError(
            f"x must be [M, {values.shape[1]}] for values of {list(values.shape)} with scales [{len(values)}, 1], got "
            f"{list(x.shape)} and {list(scales.shape)}"
        )
    return _op(x.contiguous(), values, scales, bias)[0]


def _make(draw: Draw, *, rows: int, depth: int, width: int, bias: bool = True) -> dict[str, Any]:
    values = (draw(width, depth, dtype=torch.float32) * 40).clamp(-127, 127).to(torch.int8)
    return {
        "x": draw(rows, depth),
        "values": values,
        "scales": draw(width, 1, dtype=torch.float32).abs() / 127,
        "bias": draw(width) if bias else None,
    }


KERNEL = Kernel(
    name="few_rows_linear",
    reference=few_rows_linear_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("one row", {"rows": 1, "depth": 640, "width": 70}),
        Case("odd sizes, no bias", {"rows": 5, "depth": 77, "width": 33, "bias": False}),
    ),
    bench=(
        Case("FLUX modulation of all blocks", {"rows": 1, "depth": 3072, "width": 1_056_768}),
        Case("FLUX modulation of all blocks, b4", {"rows": 4, "depth": 3072, "width": 1_056_768}),
        Case("Qwen-Image block", {"rows": 2, "depth": 3072, "width": 36_864}),
    ),
    tolerance={torch.bfloat16: (2**-7, 1e-3), torch.float16: (2**-10, 1e-3), torch.float32: (2e-5, 2e-4)},
)
