"""int8: asymmetric rows times symmetric output channels, on int8 tensor cores or torch's own CPU kernels."""

from __future__ import annotations

from math import isfinite, nan

import torch

from vivace.kernels.int8_linear import int8_linear
from vivace.kernels.quant_rows import quant_rows
from vivace.kernels.row import Quantize, RowScaled
from vivace.quant.format import Format, How, capability, unpacked
from vivace.quant.linear import QuantLinear

LEVELS = 254
"""Steps of an activation on the CPU: one less than 8 bits have, so that rounding never leaves them."""


def pack(weight: torch.Tensor, how: How) -> dict[str, torch.Tensor]:
    """`values` [N, K] int8, `scales` [N, 1], and `sums` [N, 1]: what each output channel adds for an input of ones."""
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    values = (weight / scales).round().to(torch.int8)
    return {"values": values, "scales": scales, "sums": values.sum(1, keepdim=True, dtype=torch.int32) * scales}


def product(layer: QuantLinear, x: torch.Tensor | RowScaled) -> torch.Tensor:
    """`(q s + o) W^T + b`, where q, s and o are the activation's values, scale and offset, row by row."""
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        return _on_cpu(layer, x)
    rows = x if isinstance(x, RowScaled) else quant_rows(x if x.stride(-1) == 1 else x.contiguous(), quantize="int8")
    device = rows.values.device
    if device.type == "cuda" and capability(device) < (8, 0):
        return _through_cublas(layer, rows)
    return int8_linear(rows, layer.values, scales=layer.scales, sums=layer.sums, bias=layer.bias, dtype=layer.dtype)


def _through_cublas(layer: QuantLinear, rows: RowScaled) -> torch.Tensor:
    """On Turing, for which Triton has no int8 products: cuBLAS, and the scales in a pass of their own."""
    values, factors = rows.values.flatten(0, -2), rows.scales.view(-1, 2)
    # It takes no fewer than 17 rows.
    padded = torch.nn.functional.pad(values, (0, 0, 0, max(0, 17 - len(values))))
    total = torch._int_mm(padded, layer.values.t())[: len(values)]
    shift = factors[:, 1:] * layer.sums.t()
    shift = shift if layer.bias is None else shift.add_(layer.bias)
    y = torch.addcmul(shift, total, factors[:, :1] * layer.scales.t())
    return y.to(layer.dtype).view(*rows.values.shape[:-1], -1)


def _on_cpu(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """torch's own int8 kernel, with one scale and zero point a sample."""
    if "cpu" not in layer.cache:
        bias = None if layer.bias is None else layer.bias.detach().float()
        zeros = torch.zeros(layer.out_features, dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(layer.values, None)
        layer.cache["cpu"] = (packed, layer.scales[:, 0].contiguous(), zeros, bias)
    samples = x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.reshape(len(x), -1, x.shape[-1])
    out = torch.stack([_sample_on_cpu(layer, sample) for sample in samples])
    return out.view(*x.shape[:-1], layer.out_features)


def _sample_on_cpu(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    weight, scales, zeros, bias = layer.cache["cpu"]
    low, high = (end.item() for end in x.aminmax())
    if not isfinite(high - low):
        # One scale for all of them: nothing of the sample is a number then.
        return torch.full((len(x), layer.out_features), nan, dtype=layer.dtype)
    # The range holds 0, which keeps the zero point within 8 bits.
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-12) / LEVELS
    zero = round(-low / scale)
    # Half a step more, and the cast that cuts off rounds.
    values = torch.add(zero + 0.5, x.float(), alpha=1 / scale).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        values, scale, zero, weight, scales, zeros, bias, 1.0, 0, layer.dtype, "none", [], ""
    )


def _refuses(device: torch.device) -> str | None:
    if device.type == "cpu" or capability(device) >= (7, 5):
        return None
    return f"int8 products need a GPU of compute capability 7.5 or newer, or the CPU; this is {device}"


def _takes(device: torch.device) -> Quantize | None:
    # On the CPU torch's kernel wants a scale a sample, which no row kernel can give.
    return None if device.type == "cpu" else "int8"


INT8 = Format(
    name="int8",
    summary="int8, one scale an output channel, scale and offset a token (a sample on the CPU)",
    pack=pack,
    unpack=unpacked,
    product=product,
    refuses=_refuses,
    takes=_takes,
)
