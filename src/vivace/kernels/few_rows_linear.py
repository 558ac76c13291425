"""A linear for a few rows in 16 bit, whose cost is reading its weight: in int8 at one byte an element, and not at all
for rows that were made before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, read_and_write_once, register
from vivace.kernels.language import ceil_div, jit, tl

SCHEMA = (
    "few_rows_linear(Tensor x, Tensor values, Tensor? scales, Tensor? bias, Tensor? made, Tensor? found) -> Tensor[]"
)
MOST = 8
"""Rows from which on a product on tensor cores, with the weight unpacked for it, is no slower."""

# A warp reads a line of 512 bytes, and a thread has four such loads under way.
COLUMNS, DEPTH, WARPS = 32, 512, 8


def few_rows_linear_ref(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    made: torch.Tensor | None,
    found: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    y = x.float() @ values.float().t()
    y = y if scales is None else y * scales.t()
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    return [y if made is None or found is None else torch.where(found[:, None], made, y)]


@jit
def _as_float(bytes):
    """int8 to float32: a byte in the last place of 2^23 is a float at once, where a conversion has a quarter's rate."""
    return ((bytes.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@jit
def _store_row(out, bias, y, columns, inside):
    if bias is not None:
        y = y + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + columns, y.to(out.dtype.element_ty), mask=inside)


@jit
def _product(
    x, values, scales, bias, out, row, columns, first, second, width, depth,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    inside = columns < width
    steps = tl.arange(0, DEPTH)
    one = tl.zeros((COLUMNS,), tl.float32)
    two = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, depth, DEPTH):
        left = steps < depth - start
        mask = inside[:, None] & left[None, :]
        weight = tl.load(values + columns[:, None] * depth + start + steps[None, :], mask=mask, other=0)
        weight = weight.to(tl.float32) if scales is None else _as_float(weight)
        at = x + row * depth + start + steps
        one += tl.sum(weight * tl.load(at, mask=left, other=0.0).to(tl.float32)[None, :], 1)
        if second:
            two += tl.sum(weight * tl.load(at + depth, mask=left, other=0.0).to(tl.float32)[None, :], 1)
    if scales is not None:
        scale = tl.load(scales + columns, mask=inside, other=0.0)
        one, two = one * scale, two * scale
    at = out + row.to(tl.int64) * width
    if first:
        _store_row(at, bias, one, columns, inside)
    if second:
        _store_row(at + width, bias, two, columns, inside)


@jit
def _copy(made, made_stride, found, out, row, columns, height, width):
    if tl.load(found + row, mask=row < height, other=0):
        inside = columns < width
        y = tl.load(made + row.to(tl.int64) * made_stride + columns, mask=inside)
        tl.store(out + row.to(tl.int64) * width + columns, y, mask=inside)


@jit(do_not_specialize=("height",))
def _few_rows_linear_kernel(
    x, values, scales, bias, made, found, out, height, width, depth, made_stride,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    # Programs that read the same part of the weight for other rows run together, and find it in the cache.
    pairs = tl.cdiv(height, 2)
    row = tl.program_id(0) % pairs * 2
    columns = (tl.program_id(0) // pairs).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first, second = row < height, row + 1 < height
    if made is not None:
        _copy(made, made_stride, found, out, row, columns, height, width)
        _copy(made, made_stride, found, out, row + 1, columns, height, width)
        first = first & (tl.load(found + row) == 0)
        second = second & (tl.load(found + row + 1, mask=second, other=1) == 0)
    if first | second:
        _product(x, values, scales, bias, out, row, columns, first, second, width, depth, COLUMNS, DEPTH)


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    made: torch.Tensor | None,
    found: torch.Tensor | None,
) -> list[torch.Tensor]:
    (height, depth), width = x.shape, values.shape[0]
    out = torch.empty(height, width, device=x.device, dtype=x.dtype)
    flags, stride = (None, 0) if made is None or found is None else (found.view(torch.uint8), made.stride(0))
    _few_rows_linear_kernel[(ceil_div(height, 2) * ceil_div(width, COLUMNS),)](
        x, values, scales, bias, made, flags, out, height, width, depth, stride,
        COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=WARPS,
    )  # fmt: skip
    return [out]


_op = register(SCHEMA, reference=few_rows_linear_ref, launch=_launch)


def few_rows_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    made: torch.Tensor | None = None,
    found: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, N] in x's type of a few rows `x` [M, K] and `values` [N, K], contiguous: int8 with `scales` [N, 1] fp32, or
    the weight itself without.

    Where `found` [M] is true the row of `made` [M, N] is the result's, and where all are the weight is not read. A
    row's result does not depend on the rows beside it. Raises ValueError where the sizes do not fit.
    """
    rows, width = len(x), len(values)
    if x.ndim != 2 or x.shape[1] != values.shape[1] or (scales is not None and scales.shape != (width, 1)):
        raise ValueError(
            f"x must be [M, {values.shape[1]}] for values of {list(values.shape)} with scales [{width}, 1], got "
            f"{list(x.shape)} and {None if scales is None else list(scales.shape)}"
        )
    if (made is None) != (found is None) or (
        made is not None and found is not None and (made.shape != (rows, width) or found.shape != (rows,))
    ):
        raise ValueError(f"made must be [{rows}, {width}] and found [{rows}], or both None")
    return _op(x.contiguous(), values, scales, bias, made, found)[0]


def _make(
    draw: Draw, *, rows: int, depth: int, width: int, bias: bool = True, int8: bool = True, made: int | None = None
) -> dict[str, Any]:
    """`made`: so many of the rows were."""
    values = draw(width, depth, dtype=torch.float32 if int8 else None)
    return {
        "x": draw(rows, depth),
        "values": (values * 40).clamp(-127, 127).to(torch.int8) if int8 else values,
        "scales": draw(width, 1, dtype=torch.float32).abs() / 127 if int8 else None,
        "bias": draw(width) if bias else None,
        "made": None if made is None else draw(rows, width, pad=width),
        "found": None if made is None else torch.arange(rows, device=draw.device) < made,
    }


def _bytes_moved(arguments: Mapping[str, Any], results: list[torch.Tensor]) -> int:
    """Where all rows were made the weight is not read."""
    found = arguments["found"]
    if found is None:
        return read_and_write_once(arguments, results)
    return 2 * sum(y.numel() * y.element_size() for y in results)


KERNEL = Kernel(
    name="few_rows_linear",
    reference=few_rows_linear_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("one row", {"rows": 1, "depth": 640, "width": 70}),
        Case("odd sizes, no bias", {"rows": 5, "depth": 77, "width": 33, "bias": False}),
        Case("16 bit", {"rows": 3, "depth": 600, "width": 40, "int8": False}),
        Case("some rows made before", {"rows": 5, "depth": 77, "width": 33, "made": 3}),
        Case("all made before, 16 bit", {"rows": 2, "depth": 64, "width": 70, "int8": False, "made": 2}),
    ),
    bench=(
        Case("FLUX modulation of all blocks", {"rows": 1, "depth": 3072, "width": 1_056_768}),
        Case("FLUX modulation of all blocks, b4", {"rows": 4, "depth": 3072, "width": 1_056_768}),
        Case("Qwen-Image block", {"rows": 2, "depth": 3072, "width": 36_864}),
        Case("FLUX modulation of all blocks, made before", {"rows": 1, "depth": 3072, "width": 1_056_768, "made": 1}),
    ),
    bytes_moved=_bytes_moved,
    tolerance={torch.bfloat16: (2**-7, 1e-3), torch.float16: (2**-10, 1e-3), torch.float32: (2e-5, 2e-4)},
)
