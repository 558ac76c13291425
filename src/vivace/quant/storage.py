"""Formats that only store: the weight takes 8 or 4 bits, and is unpacked to 16 for the length of each product.

A few rows (a modulation, a pooled text) are multiplied with an int8 weight as it is: that reads half of what 16 bit
would, where unpacking would read and write three times as much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vivace.kernels.few_rows_linear import MOST, few_rows_linear
from vivace.kernels.row import RowScaled
from vivace.quant import fp8, int8
from vivace.quant.format import Format, How, unpacked
from vivace.quant.linear import QuantLinear

GROUP = 64
"""Inputs that share a scale and an offset in 4 bits: 4.5 bits a weight in all."""
ALIGNED = 16
"""Bytes to whose multiples torch's int8 kernel for the CPU wants a weight's address: it ends the process at another."""


def product(layer: QuantLinear, x: torch.Tensor | RowScaled) -> torch.Tensor:
    """In 16 bit."""
    assert isinstance(x, torch.Tensor), "a format that only stores takes plain activations"
    return F.linear(x, layer.dequantised(), layer.bias)


def product_int8(layer: QuantLinear, x: torch.Tensor | RowScaled) -> torch.Tensor:
    """In 16 bit; a few rows on the stored weight itself."""
    assert isinstance(x, torch.Tensor), "a format that only stores takes plain activations"
    rows = x.reshape(-1, layer.in_features)
    if len(rows) > MOST:
        return product(layer, x)
    if x.device.type != "cpu":
        y = few_rows_linear(rows, layer.values, scales=layer.scales, bias=layer.bias)
    elif layer.in_features % 32 == 0 and layer.out_features % 4 == 0 and layer.values.data_ptr() % ALIGNED == 0:
        # torch's own kernel for the CPU, which is quick in bf16 and right for such sizes and addresses only.
        ones = torch.ones(layer.out_features, dtype=torch.bfloat16)
        rows = rows.to(torch.bfloat16).contiguous()
        y = torch._weight_int8pack_mm(rows, layer.values, ones).float() * layer.scales[:, 0]
        y = (y if layer.bias is None else y + layer.bias).to(layer.dtype)
    else:
        return product(layer, x)
    return y.view(*x.shape[:-1], layer.out_features)


def pack_fp8(weight: torch.Tensor, how: How) -> dict[str, torch.Tensor]:
    """`values` [N, K] e4m3 and `scales` [N, 1]."""
    return fp8.pack(weight, "rowwise")


def pack_int8(weight: torch.Tensor, how: How) -> dict[str, torch.Tensor]:
    """`values` [N, K] int8 and `scales` [N, 1]."""
    packed = int8.pack(weight, how)
    return {name: packed[name] for name in ("values", "scales")}


def pack_int4(weight: torch.Tensor, how: How) -> dict[str, torch.Tensor]:
    """`values` [N, K / 2] uint8 and `scales` [N, K / 64, 2] float16: scale and offset.

    A byte holds input 2 i in its low half and 2 i + 1 in its high half.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # [N, G, 64]
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Rounded first, so that the values are chosen for the scale that is stored.
    scale = ((high - low) / 15).clamp_min(6e-8).half().float()
    offset = low.half().float()
    values = ((groups - offset) / scale).round().clamp(0, 15).to(torch.uint8).flatten(1)
    pairs = values[:, ::2] | values[:, 1::2] << 4
    return {"values": pairs.contiguous(), "scales": torch.cat((scale, offset), -1).half()}


def _anywhere(device: torch.device) -> None:
    return None


FP8_WEIGHTS = Format(
    name="fp8_weights",
    summary="weights stored in e4m3, products in 16 bit",
    pack=pack_fp8,
    unpack=unpacked,
    product=product,
    refuses=_anywhere,
    takes=_anywhere,
)

INT8_WEIGHTS = Format(
    name="int8_weights",
    summary="weights stored in int8, products in 16 bit",
    pack=pack_int8,
    unpack=unpacked,
    product=product_int8,
    refuses=_anywhere,
    takes=_anywhere,
)

INT4_WEIGHTS = Format(
    name="int4_weights",
    summary=f"weights stored in 4 bits, groups of {GROUP}, products in 16 bit",
    pack=pack_int4,
    unpack=unpacked,
    product=product,
    refuses=_anywhere,
    takes=_anywhere,
    multiples=(1, GROUP),
)
