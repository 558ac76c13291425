"""GELU (tanh or exact) and SiLU, with rows as they are or row-scaled to 8 bits."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import EMULATED, ceil_div, jit, tl
from vivace.kernels.row import (
    E4M3_LIMIT,
    Quantize,
    RowScaled,
    columns_of,
    limit_of,
    part,
    rows_like,
    rows_ref,
    shaped,
    store_rows,
    tile,
    tokens_of,
)

Activation = Literal["gelu_tanh", "gelu", "silu"]
SCHEMA = "activate(Tensor x, str kind, str? quantize) -> Tensor[]"


def activation_ref(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation of `x` (fp32)."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_ref(x: torch.Tensor, kind: str, quantize: str | None) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    return rows_ref(activation_ref(x.float(), kind), x.dtype, quantize)


@jit
def _exp2(x):
    """2^x by one instruction, within 2^-22; `tl.exp2` adds four for what is too small to be normal."""
    if EMULATED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@jit
def _reciprocal(x):
    """1 / x by one instruction, within 2^-23; a division adds four for what is too large for it."""
    if EMULATED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@jit
def _sigmoid(x, COARSE: tl.constexpr):
    """With COARSE to 11 bits, by one slow instruction instead of two: enough for e4m3, which keeps 4."""
    if COARSE and not EMULATED:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], tl.float32, True, 1)
        return 0.5 * half + 0.5  # pyright: ignore[reportOperatorIssue]
    return _reciprocal(1.0 + _exp2(x * -1.4426950408889634))


@jit
def _gelu(x):
    """x P(x) of the normal distribution P, as max(x, 0) - |x| P(-|x|): erfc by Abramowitz and Stegun, 7.1.26.

    Within 2e-7; half of the instructions of `tl.erf`.
    """
    # Beyond 14 nothing is left of P(-|x|), and an infinite |x| times nothing would be no number.
    far = tl.minimum(tl.abs(x), 14.0)
    t = _reciprocal(1.0 + 0.23164189 * far)
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = far * series * _exp2(-0.72134752 * far * far)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - tail


@jit
def activation(x, KIND: tl.constexpr, COARSE: tl.constexpr):
    """The activation of `x` (fp32); COARSE where the result is rounded to e4m3.

    Coarse, "gelu" takes one slow instruction in place of two, and is within 3e-4.
    """
    if KIND == "silu":
        return x * _sigmoid(x, COARSE)
    if KIND == "gelu":
        if COARSE and not EMULATED:
            # ln(P(x) / P(-x)) of the normal distribution P, fitted up to 5; its tails come out within 1.3 %.
            square = tl.minimum(x * x, 30.0)
            return x * _sigmoid(x * (1.5957691 + square * (0.0728806398 - 0.000659531818 * square)), COARSE)
        return _gelu(x)
    # 0.5 * (1 + tanh(u)) is sigmoid(2 u), and 2 * sqrt(2 / pi) is 1.5957...
    return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), COARSE)


@jit(do_not_specialize=("tokens",))
def _activate_kernel(
    x, out, row_scale, tokens, x_batch, x_token,
    WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(WIDTH, BLOCK)
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks) * BLOCK + columns_of(BLOCK)
    mask = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]

    at = batch * x_batch + rows.to(tl.int64)[:, None] * x_token + columns[None, :]
    y = activation(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), KIND, LIMIT == E4M3_LIMIT)
    store_rows(out, row_scale, batch * tokens, rows, columns, y, mask, tokens, WIDTH, LIMIT)


def _launch(x: torch.Tensor, kind: str, quantize: str | None) -> list[torch.Tensor]:
    batch, tokens, width = x.shape
    made = rows_like(x, quantize)
    # Only a row's scale needs the whole row in one program.
    rows, block, warps = tile(width) if quantize else part(width)
    _activate_kernel[(ceil_div(tokens, rows) * ceil_div(width, block), batch)](
        x, made[0], made[-1], tokens, x.stride(0), x.stride(1),
        WIDTH=width, KIND=kind, LIMIT=limit_of(quantize), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=activate_ref, launch=_launch)


def activate(
    x: torch.Tensor, *, kind: Activation = "gelu_tanh", quantize: Quantize | None = None
) -> torch.Tensor | RowScaled:
    """The activation of `x` [B, S, D] (or [S, D]) with contiguous rows, in its type or as `RowScaled`."""
    return shaped(_op(tokens_of(x, "x"), kind, quantize), x)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    width: int,
    kind: str = "gelu_tanh",
    quantize: str | None = None,
    pad: int = 0,
) -> dict[str, Any]:
    return {"x": draw(batch, tokens, width, pad=pad), "kind": kind, "quantize": quantize}


KERNEL = Kernel(
    name="activate",
    reference=activate_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("gelu tanh, odd length", {"batch": 2, "tokens": 37, "width": 768}),
        Case("gelu, a view of wider rows", {"batch": 2, "tokens": 3, "width": 2560, "kind": "gelu", "pad": 64}),
        Case("silu, width not a multiple of 16", {"tokens": 5, "width": 1155, "kind": "silu"}),
        Case("fp8 rows", {"batch": 2, "tokens": 3, "width": 1280, "quantize": "fp8"}),
        Case("int8 rows", {"batch": 2, "tokens": 7, "width": 768, "quantize": "int8"}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4608, "width": 12288}),
        Case("FLUX 1024² single, a view", {"tokens": 4608, "width": 12288, "pad": 18432}),
        Case("FLUX 1024² fp8", {"tokens": 4608, "width": 12288, "quantize": "fp8"}),
        Case("SD3.5-medium 1024² b2", {"batch": 2, "tokens": 4096, "width": 6144}),
        Case("built-in b2", {"batch": 2, "tokens": 256, "width": 768}),
    ),
)
