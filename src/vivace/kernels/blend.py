"""`alpha * (x - add) + (1 - alpha) * (y + z)`: how the path over frames joins the path over pixels of a video block."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import check_vectors, load_columns, part, rows_like, rows_ref, tokens_of

SCHEMA = "blend(Tensor x, Tensor y, Tensor z, Tensor alpha, Tensor add) -> Tensor[]"


def blend_ref(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, add: torch.Tensor
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    alpha = alpha.float()
    mixed = alpha * (x.float() - add.float()[:, None]) + (1 - alpha) * (y.float() + z.float())
    return rows_ref(mixed, x.dtype, None)


@jit(do_not_specialize=("tokens",))
def _blend_kernel(x, y, z, alpha, add, out, tokens, width, add_batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    rows = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    mask = (rows < tokens) & inside[None, :]

    at = (batch * tokens + rows) * width + columns[None, :]
    share = tl.load(alpha).to(tl.float32)
    first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - load_columns(
        add + batch * add_batch, columns, inside
    )
    second = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) + tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    mixed = share * first + (1.0 - share) * second
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, add: torch.Tensor
) -> list[torch.Tensor]:
    x, y, z = x.contiguous(), y.contiguous(), z.contiguous()
    batch, tokens, width = x.shape
    made = rows_like(x, None)
    rows, block, warps = part(width)
    _blend_kernel[(ceil_div(tokens, rows) * ceil_div(width, block), batch)](
        x, y, z, alpha, add, made[0], tokens, width, add.stride(0), ROWS=rows, BLOCK=block, num_warps=warps
    )
    return made


_op = register(SCHEMA, reference=blend_ref, launch=_launch)


def blend(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, *, alpha: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
    """`alpha * (x - add) + (1 - alpha) * (y + z)` for x, y and z of [B, S, D], alpha of [1] and add of [B, D].

    Raises ValueError when a shape does not fit.
    """
    if not x.shape == y.shape == z.shape or alpha.numel() != 1:
        shapes = ", ".join(str(list(t.shape)) for t in (x, y, z, alpha))
        raise ValueError(f"x, y and z must have the same shape and alpha one element, got {shapes}")
    rows = tokens_of(x, "x")
    check_vectors(rows, modulation={"add": add})
    return _op(rows, tokens_of(y, "y"), tokens_of(z, "z"), alpha, add)[0].view(x.shape)


def _make(draw: Draw, *, batch: int = 1, tokens: int, width: int, pad: int = 0) -> dict[str, Any]:
    return {
        **{name: draw(batch, tokens, width) for name in "xyz"},
        "alpha": draw(1),
        "add": draw(batch, width, pad=pad),
    }


KERNEL = Kernel(
    name="blend",
    reference=blend_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, two samples", {"batch": 2, "tokens": 37, "width": 192, "pad": 32}),
        Case("wide rows", {"batch": 2, "tokens": 3, "width": 1280}),
        Case("width not a multiple of 16", {"tokens": 5, "width": 77}),
    ),
    bench=(
        Case("SVD-XT 320 72x128 b2", {"batch": 50, "tokens": 9216, "width": 320}),
        Case("SVD-XT 1280 18x32 b2", {"batch": 50, "tokens": 576, "width": 1280}),
    ),
)
