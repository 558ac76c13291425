"""`a * activation(b)`, of two tensors or two halves of one: GEGLU (UNets), SwiGLU (FLUX.2, Z-Image)."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.activate import Activation, activation, activation_ref
from vivace.kernels.gate_residual import pair_of
from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
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
)

SCHEMA = "glu(Tensor a, Tensor b, str kind, str? quantize) -> Tensor[]"


def glu_ref(a: torch.Tensor, b: torch.Tensor, kind: str, quantize: str | None) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    return rows_ref(a.float() * activation_ref(b.float(), kind), a.dtype, quantize)


@jit(do_not_specialize=("tokens",))
def _glu_kernel(
    a, b, out, row_scale, tokens, a_batch, a_token, b_batch, b_token,
    WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(WIDTH, BLOCK)
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    far = rows.to(tl.int64)[:, None]
    columns = (tl.program_id(0) % blocks) * BLOCK + columns_of(BLOCK)
    mask = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]

    x = tl.load(a + batch * a_batch + far * a_token + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(b + batch * b_batch + far * b_token + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = x * activation(gate, KIND, LIMIT == E4M3_LIMIT)
    store_rows(out, row_scale, batch * tokens, rows, columns, y, mask, tokens, WIDTH, LIMIT)


def _launch(a: torch.Tensor, b: torch.Tensor, kind: str, quantize: str | None) -> list[torch.Tensor]:
    batch, tokens, width = a.shape
    made = rows_like(a, quantize)
    rows, block, warps = tile(width) if quantize else part(width)
    _glu_kernel[(ceil_div(tokens, rows) * ceil_div(width, block), batch)](
        a, b, made[0], made[-1], tokens, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        WIDTH=width, KIND=kind, LIMIT=limit_of(quantize), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=glu_ref, launch=_launch)


def glu(
    a: torch.Tensor, b: torch.Tensor, *, kind: Activation, quantize: Quantize | None = None
) -> torch.Tensor | RowScaled:
    """`a * activation(b)` for a and b of [B, S, D] (or [S, D]) with contiguous rows, in their type or as `RowScaled`.

    Raises ValueError where their shapes differ, or a last dimension is not contiguous.
    """
    return shaped(_op(*pair_of(a, b), kind, quantize), a)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    width: int,
    kind: str = "gelu",
    halves: bool = False,
    quantize: str | None = None,
    pad: int = 0,
) -> dict[str, Any]:
    """Two tensors, or with `halves` those of one."""
    if halves:
        a, b = draw(batch, tokens, 2 * width, pad=pad).chunk(2, dim=-1)
    else:
        a, b = draw(batch, tokens, width, pad=pad), draw(batch, tokens, width)
    return {"a": a, "b": b, "kind": kind, "quantize": quantize}


KERNEL = Kernel(
    name="glu",
    reference=glu_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, two samples", {"batch": 2, "tokens": 37, "width": 768, "halves": True}),
        Case("silu, a view of wider rows", {"batch": 2, "tokens": 3, "width": 2560, "kind": "silu", "pad": 64}),
        Case("width not a multiple of 16", {"tokens": 5, "width": 1155}),
        Case("fp8 rows", {"batch": 2, "tokens": 3, "width": 1280, "quantize": "fp8"}),
        Case("int8 rows", {"batch": 2, "tokens": 7, "width": 768, "quantize": "int8"}),
    ),
    bench=(
        Case("SDXL 640 b2", {"batch": 2, "tokens": 4096, "width": 2560, "halves": True}),
        Case("SDXL 1280 b2", {"batch": 2, "tokens": 1024, "width": 5120, "halves": True}),
        Case("SDXL 640 b2 fp8", {"batch": 2, "tokens": 4096, "width": 2560, "halves": True, "quantize": "fp8"}),
        Case("SD1.5 320 b2", {"batch": 2, "tokens": 4096, "width": 1280, "halves": True}),
        Case("Z-Image 1024²", {"tokens": 4224, "width": 10240, "kind": "silu"}),
        Case("Z-Image 1024² fp8", {"tokens": 4224, "width": 10240, "kind": "silu", "quantize": "fp8"}),
    ),
)
