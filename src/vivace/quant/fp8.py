"""fp8: e4m3 values times e4m3 values on fp8 tensor cores, with a scale each row or one a sample."""

from __future__ import annotations

import functools

import torch

from vivace.kernels.quant_rows import quant_rows
from vivace.kernels.row import FORMATS, RowScaled
from vivace.quant.format import Format, How, capability, unpacked
from vivace.quant.linear import QuantLinear

E4M3 = torch.float8_e4m3fn
LIMIT = FORMATS["fp8"].limit

FEW_ROWS = 128
"""Below so many rows products accumulate exactly: they wait for the weight to be read, whatever they add up in.

And cuBLAS 13 has no kernel for a bias and fast accumulation where the rows are few (at most 42) and the inputs many.
"""


def pack(weight: torch.Tensor, how: How) -> dict[str, torch.Tensor]:
    """`values` [N, K] e4m3 and `scales` [N, 1]: one an output channel, or the same one for all ("tensorwise")."""
    if how != "tensorwise":
        return quant_rows(weight.contiguous(), quantize="fp8")._asdict()
    scale = _largest(weight).clamp_min(1e-12) / LIMIT
    return {"values": (weight.float() / scale).to(E4M3), "scales": scale.expand(len(weight), 1).contiguous()}


def product(layer: QuantLinear, x: torch.Tensor | RowScaled) -> torch.Tensor:
    """On fp8 tensor cores, every row of the activation with a scale of its own."""
    if layer.how == "tensorwise":
        assert isinstance(x, torch.Tensor), "a tensorwise product quantises its own input"
        return _tensorwise(layer, x)
    rows = x if isinstance(x, RowScaled) else quant_rows(_with_rows(x), quantize="fp8")
    y = _scaled_mm(layer, rows.values.flatten(0, -2), rows.scales.view(-1, 1), layer.scales.view(1, -1))
    return y.view(*rows.values.shape[:-1], -1)


def _tensorwise(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """One scale a sample: the kernel takes one for the whole of its input, and samples must not share any."""
    samples = x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.reshape(len(x), -1, x.shape[-1])
    out = []
    for sample in samples:
        scale = _largest(sample).clamp_min(1e-12) / LIMIT
        values = (sample * scale.reciprocal().to(sample.dtype)).clamp_(-LIMIT, LIMIT).to(E4M3)
        out.append(_scaled_mm(layer, values, scale, layer.scales[0, 0]))
    return torch.stack(out).view(*x.shape[:-1], -1)


def _scaled_mm(layer: QuantLinear, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    # The rowwise kernels write bf16; another type is a cast behind them.
    direct = layer.dtype == torch.bfloat16 or values.device.type == "cpu"
    dtype = layer.dtype if direct else torch.bfloat16
    fast = layer.how != "rowwise, exact accumulation" and len(values) >= FEW_ROWS
    y = torch._scaled_mm(
        values,
        layer.values.t(),
        scale_a=rows,
        scale_b=columns,
        bias=None if layer.bias is None else layer.bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return y.to(layer.dtype)


def _largest(x: torch.Tensor) -> torch.Tensor:
    # A norm reads once and writes nothing, where abs().amax() writes the absolute values first.
    return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuses(device: torch.device) -> str | None:
    if device.type == "cpu":
        told = f"torch {torch.__version__} has fp8 products with a scale a row on GPUs alone"
        return None if _rows_on_cpu() else f"{told}; use quant='int8' or 'fp8_weights'"
    if capability(device) >= (8, 9):
        return None
    major, minor = capability(device)
    have = f"this one has {major}.{minor}" if device.type == "cuda" else f"this is {device.type}"
    return f"fp8 products need a GPU of compute capability 8.9 or newer, {have}; use quant='int8' or 'fp8_weights'"


@functools.cache
def _rows_on_cpu() -> bool:
    """Whether this torch multiplies with a scale a row there: 2.11 does not."""
    values, scales = torch.zeros(16, 16, dtype=E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(values, values.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


FP8 = Format(
    name="fp8",
    summary="e4m3, one scale an output channel and a token",
    pack=pack,
    unpack=unpacked,
    product=product,
    refuses=_refuses,
    takes=lambda device: "fp8",
    multiples=(16, 16),
)
