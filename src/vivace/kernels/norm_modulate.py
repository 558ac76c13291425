"""LayerNorm or RMSNorm, then `* (1 + scale) + shift` with one modulation a sample or a token (adaLN), in one pass."""

from __future__ import annotations

from typing import Any, Literal

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.row import (
    Quantize,
    RowScaled,
    Vector,
    check_vectors,
    columns_of,
    limit_of,
    load_columns,
    load_vector,
    norm_ref,
    normalize,
    of_tokens,
    rows_like,
    rows_ref,
    shaped,
    store_rows,
    strides_of,
    terms,
    tile,
    tokens_of,
    vector_ref,
)

SCHEMA = (
    "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? scale_base, Tensor? shift_base, Tensor? weight, "
    "Tensor? bias, float eps, str kind, str? quantize, int room) -> Tensor[]"
)


def norm_modulate_ref(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale_base: torch.Tensor | None,
    shift_base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    quantize: str | None,
    room: int = 0,
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    y = norm_ref(x.float(), eps, kind)
    y = y * weight.float() if weight is not None else y
    y = y + bias.float() if bias is not None else y
    y = y * (1 + vector_ref(scale, scale_base)) if scale is not None else y
    y = y + vector_ref(shift, shift_base) if shift is not None else y
    return rows_ref(y, x.dtype, quantize, room=room)


@jit(do_not_specialize=("tokens",))
def _norm_modulate_kernel(
    x, scale, shift, scale_base, shift_base, weight, bias, out, row_scale,
    tokens, out_token, x_batch, x_token, scale_batch, scale_token, shift_batch, shift_token, eps,
    WIDTH: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = columns_of(BLOCK)
    inside = columns < WIDTH
    mask = (rows < tokens)[:, None] & inside[None, :]

    at = batch * x_batch + rows.to(tl.int64)[:, None] * x_token + columns[None, :]
    y = normalize(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), mask, WIDTH, eps, KIND)
    if weight is not None:
        y = y * load_columns(weight, columns, inside)
    if bias is not None:
        y = y + load_columns(bias, columns, inside)
    if scale is not None:
        sample = batch * scale_batch
        y = y * (1.0 + load_vector(scale, scale_base, sample, scale_token, rows, columns, inside, mask, EACH))
    if shift is not None:
        y = y + load_vector(shift, shift_base, batch * shift_batch, shift_token, rows, columns, inside, mask, EACH)
    store_rows(out, row_scale, batch * tokens, rows, columns, y, mask, tokens, out_token, LIMIT)


def _launch(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale_base: torch.Tensor | None,
    shift_base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    quantize: str | None,
    room: int = 0,
) -> list[torch.Tensor]:
    batch, tokens, width = x.shape
    made = rows_like(x, quantize, room=room)
    rows, block, warps = tile(width)
    _norm_modulate_kernel[(ceil_div(tokens, rows), batch)](
        x, scale, shift, scale_base, shift_base, weight, bias, made[0], made[-1],
        tokens, made[0].stride(1), x.stride(0), x.stride(1), *strides_of(scale, shift), eps,
        WIDTH=width, KIND=kind, EACH=of_tokens(scale, shift), LIMIT=limit_of(quantize),
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=norm_modulate_ref, launch=_launch)


def norm_modulate(
    x: torch.Tensor,
    *,
    scale: Vector = None,
    shift: Vector = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    kind: Literal["layer", "rms"] = "layer",
    quantize: Quantize | None = None,
    room: int = 0,
) -> torch.Tensor | RowScaled:
    """`(norm(x) * weight + bias) * (1 + scale) + shift`; whatever is None is left out.

    `x` is [B, S, D] (or [S, D]) with contiguous rows, `scale` and `shift` [B, D] (views of a wider modulation are
    fine), both [B, S, D] where each token has its own, or a `Sum`; `weight` and `bias` are [D]. Returns [B, S, D] in
    x's type, with `room` for so many columns more behind each row, or `RowScaled` values when `quantize` names a
    format. Raises ValueError when a shape does not fit, or a last dimension is not contiguous.
    """
    rows = tokens_of(x, "x")
    check_vectors(rows, modulation={"scale": scale, "shift": shift}, shared={"weight": weight, "bias": bias})
    return shaped(_op(rows, *terms(scale, shift), weight, bias, eps, kind, quantize, room), x)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    width: int,
    modulate: bool = True,
    each: bool = False,
    affine: bool = False,
    kind: str = "layer",
    quantize: str | None = None,
    room: int = 0,
    pad: int = 0,
) -> dict[str, Any]:
    """A modulation of its own for `each` token is one in two terms, the second of them fp32."""
    vector = (batch, tokens, width) if each else (batch, width)
    return {
        "x": draw(batch, tokens, width, pad=pad),
        "scale": draw(*vector, pad=pad) if modulate else None,
        "shift": draw(*vector, pad=pad) if modulate else None,
        "scale_base": draw(width, dtype=torch.float32) if each else None,
        "shift_base": draw(width, dtype=torch.float32) if each else None,
        "weight": draw(width) if affine else None,
        "bias": draw(width) if affine and kind == "layer" else None,
        "eps": 1e-6,
        "kind": kind,
        "quantize": quantize,
        "room": room,
    }


KERNEL = Kernel(
    name="norm_modulate",
    reference=norm_modulate_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, two samples", {"batch": 2, "tokens": 37, "width": 192}),
        Case("wide rows, views", {"batch": 2, "tokens": 3, "width": 3072, "pad": 64}),
        Case("width not a multiple of 16", {"tokens": 5, "width": 1155}),
        Case("rms with weight", {"batch": 2, "tokens": 5, "width": 72, "kind": "rms", "affine": True}),
        Case("affine only", {"batch": 2, "tokens": 9, "width": 640, "affine": True, "modulate": False}),
        Case("plain, one token", {"tokens": 1, "width": 320, "modulate": False}),
        Case("each token its own", {"batch": 2, "tokens": 11, "width": 192, "each": True, "pad": 64}),
        Case("room for more columns", {"batch": 2, "tokens": 7, "width": 192, "room": 48}),
        Case("fp8 rows", {"batch": 2, "tokens": 7, "width": 640, "quantize": "fp8"}),
        Case("int8 rows", {"batch": 2, "tokens": 7, "width": 1536, "quantize": "int8"}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4608, "width": 3072}),
        Case("FLUX 1024² fp8", {"tokens": 4608, "width": 3072, "quantize": "fp8"}),
        Case("SD3.5-medium 1024² b2", {"batch": 2, "tokens": 4096, "width": 1536}),
        Case("Wan 5B 704p, each token its own", {"tokens": 27280, "width": 3072, "each": True, "pad": 15360}),
        Case("Wan 14B 480p, query", {"tokens": 32760, "width": 5120, "affine": True, "modulate": False, "kind": "rms"}),
        Case("SDXL 640 b2", {"batch": 2, "tokens": 4096, "width": 640, "affine": True, "modulate": False}),
        Case("SDXL 1280 b2", {"batch": 2, "tokens": 1024, "width": 1280, "affine": True, "modulate": False}),
        Case("SD1.5 320 b2", {"batch": 2, "tokens": 4096, "width": 320, "affine": True, "modulate": False}),
        Case("built-in b2", {"batch": 2, "tokens": 256, "width": 192}),
    ),
)
