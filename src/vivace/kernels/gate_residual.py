"""`x + gate * (y + bias)`, with one gate a sample or a token: how a block's branch joins its stream."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import (
    Vector,
    check_vectors,
    load_columns,
    load_vector,
    of_tokens,
    part,
    rows_like,
    rows_ref,
    strides_of,
    terms,
    tokens_of,
    vector_ref,
)

SCHEMA = "gate_residual(Tensor x, Tensor y, Tensor? gate, Tensor? gate_base, Tensor? bias) -> Tensor[]"


def gate_residual_ref(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    branch = y.float() if bias is None else y.float() + bias.float()
    branch = branch if gate is None else branch * vector_ref(gate, gate_base)
    return rows_ref(x.float() + branch, x.dtype, None)


@jit(do_not_specialize=("tokens",))
def _gate_residual_kernel(
    x, y, gate, gate_base, bias, out,
    tokens, width, x_batch, x_token, y_batch, y_token, gate_batch, gate_token,
    EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    far = rows.to(tl.int64)[:, None]
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    mask = (far < tokens) & inside[None, :]

    branch = tl.load(y + batch * y_batch + far * y_token + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    stream = tl.load(x + batch * x_batch + far * x_token + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        branch = branch + load_columns(bias, columns, inside)
    if gate is not None:
        sample = batch * gate_batch
        branch = branch * load_vector(gate, gate_base, sample, gate_token, rows, columns, inside, mask, EACH)
    joined = (stream + branch).to(out.dtype.element_ty)
    tl.store(out + (batch * tokens + far) * width + columns[None, :], joined, mask=mask)


def _launch(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_base: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> list[torch.Tensor]:
    batch, tokens, width = x.shape
    made = rows_like(x, None)
    rows, block, warps = part(width)
    _gate_residual_kernel[(ceil_div(tokens, rows) * ceil_div(width, block), batch)](
        x, y, gate, gate_base, bias, made[0],
        tokens, width, x.stride(0), x.stride(1), y.stride(0), y.stride(1), *strides_of(gate),
        EACH=of_tokens(gate), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


def pair_of(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stream and its branch as [B, S, D]. Raises ValueError when their shapes differ."""
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape, got {list(x.shape)} and {list(y.shape)}; expand one")
    return tokens_of(x, "x"), tokens_of(y, "y")


_op = register(SCHEMA, reference=gate_residual_ref, launch=_launch)


def gate_residual(
    x: torch.Tensor, y: torch.Tensor, *, gate: Vector = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x + gate * (y + bias)` for x and y of [B, S, D] with contiguous rows, gate of [B, D] and bias of [D].

    A gate of None is one, a bias of None zero. The gate may also be each token's, [B, S, D], or a `Sum`.

    Raises ValueError when a shape does not fit, or a last dimension is not contiguous.
    """
    rows, branch = pair_of(x, y)
    check_vectors(rows, modulation={"gate": gate}, shared={"bias": bias})
    return _op(rows, branch, *terms(gate), bias)[0].view(x.shape)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    width: int,
    gated: bool = True,
    each: bool = False,
    biased: bool = False,
    pad: int = 0,
) -> dict[str, Any]:
    """A gate of its own for `each` token is one in two terms, the second of them fp32."""
    vector = (batch, tokens, width) if each else (batch, width)
    return {
        "x": draw(batch, tokens, width, pad=pad),
        "y": draw(batch, tokens, width, pad=2 * pad),
        "gate": draw(*vector, pad=pad) if gated else None,
        "gate_base": draw(width, dtype=torch.float32) if each else None,
        "bias": draw(width) if biased else None,
    }


KERNEL = Kernel(
    name="gate_residual",
    reference=gate_residual_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, two samples", {"batch": 2, "tokens": 37, "width": 192}),
        Case("wide rows, views", {"batch": 2, "tokens": 5, "width": 3072, "pad": 64}),
        Case("width not a multiple of 16", {"tokens": 5, "width": 1155}),
        Case("each token its own", {"batch": 2, "tokens": 11, "width": 192, "each": True, "pad": 64}),
        Case("no gate", {"batch": 2, "tokens": 9, "width": 640, "gated": False}),
        Case("a bias, no gate", {"batch": 2, "tokens": 9, "width": 320, "gated": False, "biased": True}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4608, "width": 3072}),
        Case("SD3.5-medium 1024² b2", {"batch": 2, "tokens": 4096, "width": 1536}),
        Case("SDXL 640 b2", {"batch": 2, "tokens": 4096, "width": 640, "gated": False}),
        Case("SDXL 320 b2, a bias", {"batch": 2, "tokens": 16384, "width": 320, "gated": False, "biased": True}),
        Case("built-in b2", {"batch": 2, "tokens": 256, "width": 192}),
    ),
)
