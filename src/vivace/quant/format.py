"""`Format`: how a linear's weight is stored in few bits, and how the product with it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from vivace.kernels.row import Quantize, RowScaled
from vivace.kernels.unpack_rows import unpack_rows
from vivace.quant import format_of

if TYPE_CHECKING:
    from vivace.quant.linear import QuantLinear

How = Literal["rowwise", "rowwise, exact accumulation", "tensorwise"]
"""How a product is scaled and summed, where its format leaves a choice; the rule table makes it."""

Packed = Mapping[str, torch.Tensor]
"""What is stored of one weight [N, K]. The first dimension of every tensor is N, so that weights can be stacked."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to hold a linear in few bits."""

    name: str
    summary: str  # for the report
    pack: Callable[[torch.Tensor, How], dict[str, torch.Tensor]]  # a weight [N, K] -> what is stored of it
    unpack: Callable[[Packed, torch.dtype], torch.Tensor]  # what is stored -> the weight [N, K] it stands for
    product: Callable[[QuantLinear, torch.Tensor | RowScaled], torch.Tensor]
    refuses: Callable[[torch.device], str | None]  # why a device cannot compute in it, None where it can
    takes: Callable[[torch.device], Quantize | None]  # the row-scaled activation that the product wants there, if any
    multiples: tuple[int, int] = (1, 1)  # a linear's outputs and inputs must be multiples of these

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        return format_of, (self.name,)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, (0, 0) of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def unpacked(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of stored `values` and `scales`."""
    return unpack_rows(packed["values"], packed["scales"], dtype=dtype)
