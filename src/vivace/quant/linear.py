"""`QuantLinear`: a linear whose weight is held in 8 or 4 bits, in the place of a `torch.nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from vivace.kernels.row import Quantize, RowScaled
from vivace.memory.joined import followed, join
from vivace.quant.format import Format, How, Packed


class QuantLinear(torch.nn.Module):
    """`x W^T + b` with W in `format`. Where a kernel in front emits what the product takes, that goes in as it is.

    In checkpoints it is the linear it stands for: `state_dict` has its `weight` in 16 bit, with what the format lost,
    and loading one packs it again. It is no `torch.nn.Linear`, so that nothing adds an adapter's delta to a weight
    that is not there.
    """

    format: Format
    how: How
    values: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor  # int8 alone
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        packed: Packed,
        *,
        format: Format,
        bias: torch.nn.Parameter | None,
        dtype: torch.dtype,
        how: How = "rowwise",
    ) -> None:
        super().__init__()
        self.format, self.how, self.dtype = format, how, dtype
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_parameter("bias", bias)
        self.cache: dict[str, Any] = {}  # what a product keeps beside the packed weight
        self.keep: Callable[[torch.Tensor], None] | None = (
            None  # takes a weight that is loaded, where originals are kept
        )
        # From shapes: where blocks are streamed, what is large lies elsewhere than its scales.
        weight = format.unpack({k: torch.empty_like(t[:1], device="meta") for k, t in packed.items()}, dtype)
        self.in_features, self.out_features = weight.shape[1], next(iter(packed.values())).shape[0]

    @classmethod
    def of(
        cls, linear: torch.nn.Linear, *, format: Format, how: How = "rowwise", on: torch.device | None = None
    ) -> QuantLinear:
        """The linear in that format, packed `on` a device that is quicker at it; its bias is shared."""
        weight = linear.weight.detach()
        packed = format.pack(weight if on is None else weight.to(on), how)
        packed = {name: part.to(weight.device) for name, part in packed.items()}
        layer = cls(packed, format=format, bias=linear.bias, dtype=linear.weight.dtype, how=how)
        return layer.train(linear.training)

    @property
    def packed(self) -> dict[str, torch.Tensor]:
        """What is stored of the weight."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        """Where it computes. Streaming brings what is large for a call alone; the scales stay there."""
        return list(self.packed.values())[-1].device

    @property
    def takes(self) -> Quantize | None:
        """The row-scaled activation that a kernel in front may hand over; None: 16 bit.

        `quantize=linear.takes` is all that such a kernel needs to know.
        """
        return None if self.how == "tensorwise" else self.format.takes(self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        return sum(t.nbytes for t in (*self.packed.values(), self.bias) if t is not None)

    def forward(self, x: torch.Tensor | RowScaled) -> torch.Tensor:
        """[..., K] or its row-scaled form -> [..., N]."""
        if isinstance(x, torch.Tensor) and not x.numel():
            # No rows have no range to scale.
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=self.dtype)
        return self.format.product(self, x)

    def part(self, rows: slice) -> QuantLinear:
        """The layer of some of its outputs alone, with views of what it has."""
        packed = {name: tensor[rows] for name, tensor in self.packed.items()}
        bias = None if self.bias is None else torch.nn.Parameter(self.bias.detach()[rows], requires_grad=False)
        return QuantLinear(packed, format=self.format, bias=bias, dtype=self.dtype, how=self.how)

    def follow(self, first: QuantLinear) -> None:
        """Have what is packed where that of `first` now is, the first of the layers that this one was `stacked` of."""
        for name, tensor in first._buffers.items():
            mine = self._buffers[name]
            if tensor is not None and mine is not None and (there := followed(mine, tensor)) is not mine:
                self._buffers[name] = there
                self.cache.clear()

    def dequantised(self) -> torch.Tensor:
        """The weight [N, K] that is really multiplied with, in the layer's type."""
        return self.format.unpack({name: part.to(self.device) for name, part in self.packed.items()}, self.dtype)

    def rewrite(self, packed: Packed) -> None:
        """Another weight of the same shape, in place: whoever holds views of it, or recorded its address, sees it."""
        self.cache.clear()
        for name, tensor in packed.items():
            self.packed[name].copy_(tensor)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # Packed values follow to another device; a cast is for what the layer computes in, and would spoil them.
        self.cache.clear()
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        packed, self._buffers, self.dtype = self._buffers, {}, probe.dtype
        super()._apply(fn, recurse)
        self._buffers = {name: _moved(tensor, probe.device) for name, tensor in packed.items() if tensor is not None}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}, "keep": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.dequantised()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        key, shape = f"{prefix}weight", (self.out_features, self.in_features)
        weight = state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if weight is None:
            missing.append(key)
        elif weight.shape != shape:
            errors.append(f"size mismatch for {key}: {tuple(weight.shape)} in the checkpoint, {shape} in this model.")
        elif self.device.type == "meta":
            # There is no memory to write into.
            self._buffers.update(self.format.pack(weight.detach(), self.how))
        else:
            # What it shows of itself tells nothing of the original.
            if self.keep is not None and not torch.equal(weight.to(self.device, self.dtype), self.dequantised()):
                self.keep(weight.detach())
            # In place: it may be a part of what is joined, or streamed.
            self.rewrite(self.format.pack(weight.to(self.device), self.how))


def stackable(layers: Sequence[torch.nn.Module]) -> bool:
    """Whether linears with the same input can be one: all in 16 bit, or all quantised in one way."""
    kinds = {(layer.format.name, layer.how) if isinstance(layer, QuantLinear) else None for layer in layers}
    # A tensorwise weight has one scale, and two weights have two.
    return len(kinds) == 1 and not any(kind and kind[1] == "tensorwise" for kind in kinds)


def stacked(layers: Sequence[QuantLinear], bias: torch.Tensor | None, *, undo: ExitStack) -> QuantLinear:
    """Linears with the same input and format as one, whose packed weight theirs become views of until `undo`."""
    first = layers[0]
    assert stackable(layers)
    joined = {name: join([layer.packed[name] for layer in layers], undo) for name in first.packed}
    bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return QuantLinear(joined, format=first.format, bias=bias, dtype=first.dtype, how=first.how)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
