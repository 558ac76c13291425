"""A weight held in 8 or 4 bits, as 16-bit rows again: in front of a product that is done in 16 bit."""

from __future__ import annotations

from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl

SCHEMA = "unpack_rows(Tensor values, Tensor scales, ScalarType dtype) -> Tensor[]"
BLOCK = 2048  # 16 bytes a thread


def unpack_rows_ref(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The operation in torch."""
    if scales.ndim == 2:
        return [(values.float() * scales.float()).to(dtype)]
    both = torch.stack((values & 15, values >> 4), -1).flatten(1).float()
    groups = both.unflatten(1, (scales.shape[1], -1))
    return [torch.addcmul(scales[..., 1:].float(), groups, scales[..., :1].float()).flatten(1).to(dtype)]


@jit
def _unpack_rows_kernel(values, scales, out, width, groups, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if KIND == "int4":
        pair = tl.load(values + row * (width // 2) + columns // 2, mask=inside, other=0).to(tl.int32)
        x = ((pair >> ((columns & 1) * 4)) & 15).to(tl.float32)
        factors = scales + (row * groups + columns // (width // groups)) * 2
        scale = tl.load(factors, mask=inside, other=0.0).to(tl.float32)
        x = x * scale + tl.load(factors + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(values + row * width + columns, mask=inside, other=0)
        if KIND == "e4m3":
            # Its bits are those of a half whose exponent is 8 too small; older GPUs have no conversion.
            bits = x.to(tl.int16)
            half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:
            x = x.to(tl.float32)
        x = x * tl.load(scales + row).to(tl.float32)
    tl.store(out + row * width + columns, x.to(out.dtype.element_ty), mask=inside)


def _launch(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    kind = "int4" if scales.ndim == 3 else "e4m3" if values.dtype == torch.float8_e4m3fn else "int8"
    height, width = values.shape[0], values.shape[1] * (2 if kind == "int4" else 1)
    out = torch.empty(height, width, device=values.device, dtype=dtype)
    _unpack_rows_kernel[(height, ceil_div(width, BLOCK))](
        values if kind == "int8" else values.view(torch.uint8), scales, out, width, scales.shape[1],
        KIND=kind, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return [out]


_op = register(SCHEMA, reference=unpack_rows_ref, launch=_launch)


def unpack_rows(values: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] in `dtype` of contiguous `values` [N, K] in fp8 or int8 with `scales` [N, 1].

    Or of `values` [N, K / 2] uint8, each an even input in the low and an odd one in the high half, with `scales`
    [N, groups, 2]: a group's scale and offset.
    """
    return _op(values, scales, dtype)[0]


def _make(draw: Draw, *, rows: int, width: int, stored: str, group: int = 64) -> dict[str, Any]:
    if stored == "int4":
        values = (draw(rows, width // 2, dtype=torch.float32) * 40).abs().clamp(0, 255).to(torch.uint8)
        return {"values": values, "scales": draw(rows, width // group, 2, dtype=torch.float16), "dtype": draw.dtype}
    kind = torch.int8 if stored == "int8" else torch.float8_e4m3fn
    values = (draw(rows, width, dtype=torch.float32) * 30).to(kind)
    return {"values": values, "scales": draw(rows, 1, dtype=torch.float32), "dtype": draw.dtype}


KERNEL = Kernel(
    name="unpack_rows",
    reference=unpack_rows_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("int8, odd width", {"rows": 3, "width": 1155, "stored": "int8"}),
        Case("fp8", {"rows": 5, "width": 1152, "stored": "fp8"}),
        Case("int4", {"rows": 3, "width": 1152, "stored": "int4"}),
    ),
    bench=(
        Case("FLUX single-block in, fp8", {"rows": 21504, "width": 3072, "stored": "fp8"}),
        Case("FLUX single-block in, int4", {"rows": 21504, "width": 3072, "stored": "int4"}),
    ),
)
