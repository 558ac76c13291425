"""LoRA added into the weights in place: no cost per step, and taken out again to the bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from vivace.errors import InputError
from vivace.lora.adapters import Factor, Place, Strength
from vivace.memory.pinned import hold
from vivace.quant.linear import QuantLinear


@dataclass(kw_only=True)
class Base:
    """A parameter as it was before anything was merged into it."""

    parameter: weakref.ref[torch.Tensor]
    value: torch.Tensor
    changed: bool = False  # whether the parameter holds something else now


class Merged:
    """Adapters merged into their linears' and convolutions' weights.

    Sums are taken in fp32 from the untouched weight every time, so that swapping a hundred times drifts by nothing and
    what is taken out leaves the very bits. The untouched weights are kept where there is room: on the device while
    a quarter of it stays free, else in host memory.
    """

    def __init__(self, *, on_device: bool = True, rebuilt: Callable[[], None] = lambda: None) -> None:
        self._on_device = on_device  # whether untouched weights may take the device's memory
        self._rebuilt = rebuilt  # what was made of a quantised weight besides its bytes holds no longer
        self._bases: dict[int, Base] = {}
        self._packed: dict[QuantLinear, dict[str, torch.Tensor]] = {}  # as they were
        self._requantised: set[QuantLinear] = set()

    @property
    def beside(self) -> bool:
        return False

    @property
    def nbytes(self) -> dict[str, int]:
        """Memory that the untouched weights take, by kind of device."""
        found: dict[str, int] = {}
        for base in self._bases.values():
            found[base.value.device.type] = found.get(base.value.device.type, 0) + base.value.nbytes
        return found

    def refuses(self, place: Place) -> str | None:
        return None

    @torch.no_grad()
    def settle(self, places: Iterable[Place], strength: Strength) -> None:
        if not isinstance(strength, int | float):
            raise InputError(
                "merged adapters have one strength for the whole batch; strengths per request need lora='side'"
            )
        kept: set[int] = set()
        requantised = set()
        for place in places:
            factors = [factor for factor in place.factors() if factor.scale * strength]
            if factors and place.original is not None:
                requantised.add(self._requantise(place, factors, strength))
            elif factors:
                kept.add(self._merge(place.module, factors, strength))
            kept |= self._shift(place, factors, strength)
        self._unpack(self._requantised - requantised)
        if requantised or self._requantised:
            self._rebuilt()
        self._requantised = requantised
        for key, base in self._bases.items():
            if key not in kept:
                _put_back(base)

    @torch.no_grad()
    def withdraw(self) -> None:
        for base in self._bases.values():
            _put_back(base)
        if self._requantised:
            self._unpack(self._requantised)
            self._requantised = set()
            self._rebuilt()

    def forget(self) -> None:
        assert not any(base.changed for base in self._bases.values()), "withdraw comes before forget"
        self._bases.clear()
        self._packed.clear()

    def _requantise(self, place: Place, factors: list[Factor], strength: float) -> QuantLinear:
        """Quantise the original weight plus the factors into the layer that stands in for it."""
        layer, original = place.module, place.original
        assert isinstance(layer, QuantLinear)
        assert original is not None
        if layer not in self._packed:
            self._packed[layer] = {name: tensor.clone() for name, tensor in layer.packed.items()}
        total = _sum(original().to(layer.device), factors, strength)
        layer.rewrite(layer.format.pack(total.to(layer.dtype), layer.how))
        return layer

    def _unpack(self, layers: Iterable[QuantLinear]) -> None:
        for layer in layers:
            layer.rewrite(self._packed[layer])

    def _merge(self, module: torch.nn.Module, factors: list[Factor], strength: float) -> int:
        """Write the base of a module's weight plus its factors; returns the key of the weight."""
        weight = module.get_parameter("weight")
        base = self._base(weight)
        total = _sum(base.value.to(weight.device), factors, strength)
        weight.data.copy_(total.view_as(weight))
        base.changed = True
        return id(weight)

    def _shift(self, place: Place, factors: list[Factor], strength: float) -> set[int]:
        """Write the base of a module's bias, which is in no format, plus the factors'; returns the bias's key."""
        biases = [(factor.bias, factor.scale * strength) for factor in factors if factor.bias is not None]
        bias = getattr(place.module, "bias", None)
        if bias is None and any(value.any() for value, _ in biases):
            raise InputError(f"{place.name} has no bias, and this LoRA changes it; use lora='side'")
        if bias is None or not biases:
            return set()
        base = self._base(bias)
        shift = sum(scale * value.to(bias.device, torch.float32) for value, scale in biases)
        bias.data.copy_(base.value.to(bias.device, torch.float32) + shift)
        base.changed = True
        return {id(bias)}

    def _base(self, parameter: torch.Tensor) -> Base:
        base = self._bases.get(id(parameter))
        # An id names a parameter only as long as it lives.
        if base is None or base.parameter() is not parameter:
            base = self._bases[id(parameter)] = Base(parameter=weakref.ref(parameter), value=self._copy(parameter.data))
        return base

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor.clone()
        free, total = torch.cuda.mem_get_info(tensor.device)
        if self._on_device and free - tensor.nbytes > total / 4:
            return tensor.clone()
        flat = hold(tensor.nbytes, pin=True)
        return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _sum(weight: torch.Tensor, factors: list[Factor], strength: float) -> torch.Tensor:
    """A weight and its factors in fp32, `[out, in]`, of a convolution `[out, in * kernel]`."""
    total = weight.float().flatten(1)
    for factor in factors:
        up, down = (f.to(weight.device, torch.float32).flatten(1) for f in (factor.up, factor.down))
        total = torch.addmm(total, up, down, alpha=factor.scale * strength)
    return total


def _put_back(base: Base) -> None:
    parameter = base.parameter()
    if base.changed and parameter is not None:
        parameter.data.copy_(base.value)
    base.changed = False
