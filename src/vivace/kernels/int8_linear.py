"""A linear in int8: asymmetric rows, symmetric output channels, and both scales and the bias in the same pass."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import RowScaled, rows_ref

SCHEMA = (
    "int8_linear(Tensor x, Tensor factors, Tensor weight, Tensor scales, Tensor sums, Tensor? bias, ScalarType dtype) "
    "-> Tensor[]"
)
ROWS, COLUMNS, DEPTH = 128, 128, 128
GROUP = 8
"""Row tiles that are worked on together, so that a column tile of the weight is read from the cache."""


def int8_linear_ref(
    x: torch.Tensor,
    factors: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """The operation in torch. Sums of int8 products up to 2**24 are exact in fp32; float64 has room for any width."""
    total = (x.double() @ weight.double().t()).float()
    y = total * factors[:, :1] * scales.t() + factors[:, 1:] * sums.t()
    return [(y + bias.float() if bias is not None else y).to(dtype)]


@jit(do_not_specialize=("height",))
def _int8_linear_kernel(
    x, factors, weight, scales, sums, bias, out, height, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    high = tl.minimum(tl.cdiv(height, ROWS) - first, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    rows = (first + place % high) * ROWS + tl.arange(0, ROWS)
    columns = place // high * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < height
    within = columns < width
    steps = tl.arange(0, DEPTH)

    from_x = x + rows.to(tl.int64)[:, None] * depth + steps[None, :]
    from_weight = weight + columns.to(tl.int64)[None, :] * depth + steps[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, depth, DEPTH):
        left = steps < depth - start
        a = tl.load(from_x + start, mask=inside[:, None] & left[None, :], other=0)
        b = tl.load(from_weight + start, mask=left[:, None] & within[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)

    scale = tl.load(factors + rows * 2, mask=inside, other=0.0)
    offset = tl.load(factors + rows * 2 + 1, mask=inside, other=0.0)
    channel = tl.load(scales + columns, mask=within, other=0.0)
    ones = tl.load(sums + columns, mask=within, other=0.0)
    y = total.to(tl.float32) * scale[:, None] * channel[None, :] + offset[:, None] * ones[None, :]
    if bias is not None:
        y = y + tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside[:, None] & within[None, :])


def _launch(
    x: torch.Tensor,
    factors: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    (height, depth), width = x.shape, weight.shape[0]
    out = torch.empty(height, width, device=x.device, dtype=dtype)
    _int8_linear_kernel[(ceil_div(height, ROWS) * ceil_div(width, COLUMNS),)](
        x, factors, weight, scales, sums, bias, out, height, width, depth,
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, GROUP=GROUP, num_warps=8, num_stages=3,
    )  # fmt: skip
    return [out]


_op = register(SCHEMA, reference=int8_linear_ref, launch=_launch)


def int8_linear(
    x: RowScaled,
    weight: torch.Tensor,
    *,
    scales: torch.Tensor,
    sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[..., N] in `dtype` of int8 rows [..., K] and `weight` [N, K] int8 with `scales` [N, 1].

    `sums` [N, 1] is what an input of ones gives: with the rows' offsets it is all that their asymmetry costs.
    """
    values, factors = x.values.flatten(0, -2), x.scales.view(-1, 2)
    return _op(values, factors, weight, scales, sums, bias, dtype)[0].view(*x.values.shape[:-1], -1)


def _make(draw: Draw, *, rows: int, depth: int, width: int, bias: bool = True) -> dict[str, Any]:
    values, factors = rows_ref(draw(rows, depth).float(), draw.dtype, "int8")
    weight = draw(width, depth, dtype=torch.float32)
    scales = weight.abs().amax(1, keepdim=True) / 127
    weight = (weight / scales).round().to(torch.int8)
    return {
        "x": values,
        "factors": factors,
        "weight": weight,
        "scales": scales,
        "sums": weight.sum(1, keepdim=True, dtype=torch.int32) * scales,
        "bias": draw(width) if bias else None,
        "dtype": draw.dtype,
    }


KERNEL = Kernel(
    name="int8_linear",
    reference=int8_linear_ref,
    launch=_launch,
    op=_op,
    make=_make,
    since=80,  # Triton has no int8 products for Turing
    cases=(
        Case("odd sizes", {"rows": 37, "depth": 200, "width": 150}),
        Case("several tiles, no bias", {"rows": 300, "depth": 256, "width": 272, "bias": False}),
    ),
    bench=(
        Case("FLUX qkv", {"rows": 4608, "depth": 3072, "width": 9216}),
        Case("FLUX mlp down", {"rows": 4608, "depth": 12288, "width": 3072}),
        Case("SDXL geglu 1280", {"rows": 2048, "depth": 1280, "width": 10240}),
        Case("SDXL qkv 1280", {"rows": 2048, "depth": 1280, "width": 3840}),
    ),
    tolerance={torch.bfloat16: (2**-7, 1e-3), torch.float16: (2**-10, 1e-3), torch.float32: (2e-5, 2e-4)},
)
