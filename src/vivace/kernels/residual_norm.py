"""`h = x + gate * y` and the norm (and modulation) of h that the next branch reads, in one pass that writes both.

With gate, scale and shift it is the middle of an adaLN transformer block; with weight and bias alone, the residual add
and LayerNorm of a UNet's transformer block. It can add the bias of the product that made y, and into h, behind the
norm's back, that of the product which will be added to h in place: epilogues with a bias are slower ones. A block with
two attentions adds both at once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from vivace.kernels.gate_residual import gate_residual_ref, pair_of
from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl
from vivace.kernels.norm_modulate import norm_modulate_ref
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
)

SCHEMA = (
    "residual_norm(Tensor x, Tensor y, Tensor? y_bias, Tensor? y_weight, Tensor? add, Tensor? after, Tensor? also, "
    "Tensor? also_gate, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? gate_base, Tensor? scale_base, "
    "Tensor? shift_base, Tensor? weight, Tensor? bias, float eps, str kind, str? quantize, int room) -> Tensor[]"
)


def residual_norm_ref(
    x: torch.Tensor,
    y: torch.Tensor,
    y_bias: torch.Tensor | None,
    y_weight: torch.Tensor | None,
    add: torch.Tensor | None,
    after: torch.Tensor | None,
    also: torch.Tensor | None,
    also_gate: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate_base: torch.Tensor | None,
    scale_base: torch.Tensor | None,
    shift_base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    quantize: str | None,
    room: int = 0,
) -> list[torch.Tensor]:
    """The operation in torch: h is normalised in fp32, before it is rounded to x's type."""
    y = y if y_bias is None else y.float() + y_bias.float()
    y = y if y_weight is None else norm_ref(y.float(), eps, "rms") * y_weight.float()
    (h,) = gate_residual_ref(x.float() if add is None else x.float() + add.float()[:, None], y, gate, gate_base)
    (h,) = (h,) if also is None else gate_residual_ref(h, also, also_gate)
    normed = norm_modulate_ref(h, scale, shift, scale_base, shift_base, weight, bias, eps, kind, quantize)
    h = h if after is None else h + after.float()
    return [h.to(x.dtype), *(normed if quantize else rows_ref(normed[0], x.dtype, None, room=room))]


@jit(do_not_specialize=("tokens",))
def _residual_norm_kernel(
    x, y, y_bias, y_weight, add, after, also, also_gate, gate, scale, shift, gate_base, scale_base, shift_base,
    weight, bias, h, out, row_scale,
    tokens, out_token, x_batch, x_token, y_batch, y_token, add_batch, also_batch, also_token, also_gate_batch,
    gate_batch, gate_token, scale_batch, scale_token, shift_batch, shift_token, eps,
    WIDTH: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    far = rows.to(tl.int64)[:, None]
    columns = columns_of(BLOCK)
    inside = columns < WIDTH
    mask = (rows < tokens)[:, None] & inside[None, :]

    branch = tl.load(y + batch * y_batch + far * y_token + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    stream = tl.load(x + batch * x_batch + far * x_token + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if y_bias is not None:
        branch = branch + load_columns(y_bias, columns, inside)
    if y_weight is not None:
        branch = normalize(branch, mask, WIDTH, eps, "rms") * load_columns(y_weight, columns, inside)
    if gate is not None:
        sample = batch * gate_batch
        branch = branch * load_vector(gate, gate_base, sample, gate_token, rows, columns, inside, mask, EACH)
    stream = stream + branch
    if add is not None:
        stream = stream + load_columns(add + batch * add_batch, columns, inside)
    if also is not None:
        branch = tl.load(also + batch * also_batch + far * also_token + columns[None, :], mask=mask, other=0.0)
        stream = stream + branch.to(tl.float32) * load_columns(also_gate + batch * also_gate_batch, columns, inside)
    first = batch * tokens
    kept = stream
    if after is not None:
        kept = stream + load_columns(after, columns, inside)
    store_rows(h, h, first, rows, columns, kept, mask, tokens, WIDTH, 0.0)

    normed = normalize(stream, mask, WIDTH, eps, KIND)
    if weight is not None:
        normed = normed * load_columns(weight, columns, inside)
    if bias is not None:
        normed = normed + load_columns(bias, columns, inside)
    if scale is not None:
        sample = batch * scale_batch
        normed = normed * (1.0 + load_vector(scale, scale_base, sample, scale_token, rows, columns, inside, mask, EACH))
    if shift is not None:
        sample = batch * shift_batch
        normed = normed + load_vector(shift, shift_base, sample, shift_token, rows, columns, inside, mask, EACH)
    store_rows(out, row_scale, first, rows, columns, normed, mask, tokens, out_token, LIMIT)


def _launch(
    x: torch.Tensor,
    y: torch.Tensor,
    y_bias: torch.Tensor | None,
    y_weight: torch.Tensor | None,
    add: torch.Tensor | None,
    after: torch.Tensor | None,
    also: torch.Tensor | None,
    also_gate: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate_base: torch.Tensor | None,
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
    made = [*rows_like(x, None), *rows_like(x, quantize, room=room)]
    rows, block, warps = tile(width)
    _residual_norm_kernel[(ceil_div(tokens, rows), batch)](
        x, y, y_bias, y_weight, add, after, also, also_gate, gate, scale, shift, gate_base, scale_base, shift_base,
        weight, bias, made[0], made[1], made[-1],
        tokens, made[1].stride(1), x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        0 if add is None else add.stride(0), *((0, 0) if also is None else also.stride()[:2]),
        0 if also_gate is None else also_gate.stride(0), *strides_of(gate, scale, shift), eps,
        WIDTH=width, KIND=kind, EACH=of_tokens(gate, scale, shift), LIMIT=limit_of(quantize),
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return made


_op = register(SCHEMA, reference=residual_norm_ref, launch=_launch)


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    y_bias: torch.Tensor | None = None,
    y_weight: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    also: torch.Tensor | None = None,
    also_gate: torch.Tensor | None = None,
    gate: Vector = None,
    scale: Vector = None,
    shift: Vector = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    kind: Literal["layer", "rms"] = "layer",
    quantize: Quantize | None = None,
    room: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | RowScaled]:
    """`h = x + gate * (y + y_bias) + add + also_gate * also`, and `(norm(h) * weight + bias) * (1 + scale) + shift`.

    None is left out. `x`, `y` and `also` are [B, S, D] with contiguous rows, `gate`, `scale` and `shift` [B, D] or all
    of them [B, S, D] (or a `Sum` of such and [D]), `add` and `also_gate` [B, D], `weight`, `bias` and `y_bias` [D].
    With `y_weight` [D] it is the RMSNorm of y, times that weight, that joins h.
    Returns h in x's type, plus `after` [D] that the norm does not see, and the second in x's type too, with `room` for
    so many columns more behind each row, or as `RowScaled` when `quantize` names a format. Raises ValueError when a
    shape does not fit, or a last dimension is not contiguous.
    """
    rows, branch = pair_of(x, y)
    check_vectors(
        rows,
        modulation={"gate": gate, "scale": scale, "shift": shift},
        shared={"y_bias": y_bias, "y_weight": y_weight, "after": after, "weight": weight, "bias": bias},
    )
    check_vectors(rows, modulation={"add": add, "also_gate": also_gate})
    if (also is None) != (also_gate is None):
        raise ValueError("also and also_gate come together")
    more = None if also is None else pair_of(x, also)[1]
    vectors = (y_bias, y_weight, add, after, more, also_gate, *terms(gate, scale, shift), weight, bias)
    h, *normed = _op(rows, branch, *vectors, eps, kind, quantize, room)
    return h.view(x.shape), shaped(normed, x)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    width: int,
    modulate: bool = True,
    sandwich: bool = False,
    each: bool = False,
    added: bool = False,
    biased: bool = False,
    two: bool = False,
    kind: str = "layer",
    quantize: str | None = None,
    room: int = 0,
    pad: int = 0,
) -> dict[str, Any]:
    """Gate, scale and shift with `modulate`, in two terms for `each` token; weight and bias without; all but shift and
    bias with `sandwich`. `biased`: the branch still lacks its bias, and so will what joins h next. `two` branches."""
    vector = (batch, tokens, width) if each else (batch, width)
    gate, scale, shift = (draw(*vector, pad=pad) if modulate else None for _ in range(3))
    bases = [draw(width, dtype=torch.float32) if each else None for _ in range(3)]
    return {
        "x": draw(batch, tokens, width, pad=pad),
        "y": draw(batch, tokens, width, pad=2 * pad),
        "y_bias": draw(width) if biased else None,
        "y_weight": draw(width) if sandwich else None,
        "add": draw(batch, width, pad=pad) if added else None,
        "after": draw(width) if biased else None,
        "also": draw(batch, tokens, width, pad=pad) if two else None,
        "also_gate": draw(batch, width, pad=pad) if two else None,
        "gate": gate,
        "scale": scale,
        "shift": None if sandwich else shift,
        "gate_base": bases[0],
        "scale_base": bases[1],
        "shift_base": bases[2],
        "weight": draw(width) if sandwich or not modulate else None,
        "bias": None if modulate or kind == "rms" else draw(width),
        "eps": 1e-6,
        "kind": kind,
        "quantize": quantize,
        "room": room,
    }


KERNEL = Kernel(
    name="residual_norm",
    reference=residual_norm_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("odd length, two samples", {"batch": 2, "tokens": 37, "width": 192}),
        Case("wide rows, views", {"batch": 2, "tokens": 3, "width": 3072, "pad": 64}),
        Case("width not a multiple of 16", {"tokens": 5, "width": 1155}),
        Case("each token its own", {"batch": 2, "tokens": 11, "width": 192, "each": True, "pad": 64}),
        Case("a vector a sample added", {"batch": 2, "tokens": 5, "width": 320, "modulate": False, "added": True}),
        Case("add and LayerNorm", {"batch": 2, "tokens": 9, "width": 640, "modulate": False}),
        Case("add and RMSNorm", {"batch": 2, "tokens": 9, "width": 320, "modulate": False, "kind": "rms"}),
        Case("both normalised", {"batch": 2, "tokens": 5, "width": 240, "sandwich": True, "kind": "rms", "pad": 16}),
        Case("late biases", {"batch": 2, "tokens": 9, "width": 328, "modulate": False, "biased": True}),
        Case("late biases, both normalised", {"tokens": 5, "width": 240, "sandwich": True, "biased": True}),
        Case("two branches, views", {"batch": 2, "tokens": 7, "width": 192, "two": True, "pad": 64}),
        Case("room for more columns", {"batch": 2, "tokens": 7, "width": 192, "room": 48}),
        Case("fp8 rows", {"batch": 2, "tokens": 7, "width": 640, "quantize": "fp8"}),
        Case("int8 rows", {"batch": 2, "tokens": 7, "width": 1536, "quantize": "int8"}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4608, "width": 3072}),
        Case("FLUX 1024² fp8", {"tokens": 4608, "width": 3072, "quantize": "fp8"}),
        Case("SD3.5-medium 1024² b2", {"batch": 2, "tokens": 4096, "width": 1536}),
        Case("SD3.5-medium 1024² b2, two attentions", {"batch": 2, "tokens": 4096, "width": 1536, "two": True}),
        Case("Z-Image 1024²", {"tokens": 4224, "width": 3840, "sandwich": True, "kind": "rms"}),
        Case("Wan 14B 480p", {"tokens": 32760, "width": 5120}),
        Case("Wan 5B 704p, each token its own", {"tokens": 27280, "width": 3072, "each": True, "pad": 15360}),
        Case("SDXL 640 b2", {"batch": 2, "tokens": 4096, "width": 640, "modulate": False}),
        Case("SDXL 1280 b2", {"batch": 2, "tokens": 1024, "width": 1280, "modulate": False}),
        Case("SD1.5 320 b2", {"batch": 2, "tokens": 4096, "width": 320, "modulate": False}),
        Case(
            "SD1.5 320 b2, late biases", {"batch": 2, "tokens": 4096, "width": 320, "modulate": False, "biased": True}
        ),
        Case("built-in b2", {"batch": 2, "tokens": 256, "width": 192}),
    ),
)
