"""LoRA beside the linears: low-rank products added to their outputs, with strengths that may change at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from vivace.errors import InputError
from vivace.lora.adapters import Factor, Place, Strength
from vivace.one_off import give_class
from vivace.quant.linear import QuantLinear

RANK_STEP = 16
"""Ranks are padded with zeros to multiples of this: what tensor cores take, and room for the next adapter's."""


class Side:
    """The adapters of one linear or convolution: `y + (x @ down.T * strengths) @ up.T`.

    The tensors keep their storage when another adapter of at most `capacity` ranks is filled in, so that recorded
    graphs stay valid.
    """

    def __init__(self, module: torch.nn.Module, *, capacity: int, device: torch.device) -> None:
        (outputs, *inputs), dtype = _form(module)
        place = {"device": device, "dtype": dtype}
        self.capacity = capacity
        self.down = torch.zeros(capacity, *inputs, **place)  # [R, in], of a convolution [R, in, *kernel]
        self.up = torch.zeros(outputs, capacity, **place)  # [out, R], with scale and strength multiplied in
        self.bias: torch.Tensor | None = None  # [out]
        self.strengths: torch.Tensor | None = None  # [N, R] where the N requests of a batch differ

    def fits(self, module: torch.nn.Module, rank: int) -> bool:
        (outputs, *inputs), dtype = _form(module)
        same = [self.up.shape[0], *self.down.shape[1:]] == [outputs, *inputs] and self.up.dtype == dtype
        return same and rank <= self.capacity

    def fill(self, factors: Sequence[Factor], strength: Strength) -> None:
        """Hold these factors from now on."""
        uniform = strength if isinstance(strength, int | float) else 1.0
        self.down.zero_()
        self.up.zero_()
        row = 0
        for factor in factors:
            rows = slice(row, row := row + factor.down.shape[0])
            self.down[rows] = factor.down.to(self.down)
            up = factor.up.to(self.up.device, torch.float32).flatten(1)
            self.up[:, rows] = (up * (factor.scale * uniform)).to(self.up.dtype)
        biases = [f.bias.to(self.up.device, torch.float32) * f.scale for f in factors if f.bias is not None]
        self.bias = (torch.stack(biases).sum(0) * uniform).to(self.up.dtype) if biases else None
        if isinstance(strength, int | float):
            self.strengths = None
            return
        table = torch.zeros(len(strength), self.capacity)
        for number, one in enumerate(strength):
            parts = [torch.full((f.down.shape[0],), _strength_of(one, f.adapter)) for f in factors]
            table[number, :row] = torch.cat(parts)
        self.strengths = table.to(self.down)

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add what a linear's adapters make of `x` `[B, ..., in]` to its output `out` `[B, ..., out]`, in place."""
        h = torch.nn.functional.linear(x.to(self.down.dtype), self.down)  # [B, ..., R]
        if self.strengths is not None:
            h = h * self.rows(x.shape[0]).view(x.shape[0], *[1] * (x.ndim - 2), -1)
        # One GEMM that adds to what is there; `out` may be a slice of a wider one.
        torch.addmm(flat := out.flatten(0, -2), h.flatten(0, -2), self.up.T, out=flat)
        if self.bias is not None:
            out += self.bias

    def rows(self, batch: int) -> torch.Tensor:
        """The strengths `[B, R]`: guidance repeats the batch, the unconditional half first."""
        assert self.strengths is not None
        repeats, rest = divmod(batch, len(self.strengths))
        if rest:
            raise InputError(
                f"{len(self.strengths)} LoRA strengths do not fit a batch of {batch}; give one, or one per picture"
            )
        return self.strengths.repeat(repeats, 1)


def side_of(module: torch.nn.Module) -> Side | None:
    """The adapters beside a module, which whoever reads its weight instead of calling it has to add."""
    return getattr(type(module), "vivace_side", None)


class Sides:
    """Adapters beside their modules: nothing is written to a weight."""

    def __init__(self, *, changed: Callable[[], None], device: Callable[[], torch.device]) -> None:
        self._changed = changed  # recorded graphs hold no longer
        self._device = device  # where the denoiser computes
        self._sides: dict[torch.nn.Module, tuple[Side, Callable[[], None]]] = {}

    @property
    def beside(self) -> bool:
        return bool(self._sides)

    @property
    def nbytes(self) -> dict[str, int]:
        """Memory of the factors, by kind of device."""
        found: dict[str, int] = {}
        for side, _ in self._sides.values():
            found[side.up.device.type] = found.get(side.up.device.type, 0) + side.up.nbytes + side.down.nbytes
        return found

    @torch.no_grad()
    def settle(self, places: Iterable[Place], strength: Strength) -> None:
        wanted = {place.module: factors for place in places if (factors := place.factors())}
        before = {module: side.strengths is None for module, (side, _) in self._sides.items()}
        for module in [module for module in self._sides if module not in wanted]:
            self._sides.pop(module)[1]()
        for module, factors in wanted.items():
            self._beside(module, rank=sum(factor.down.shape[0] for factor in factors)).fill(factors, strength)
        after = {module: side.strengths is None for module, (side, _) in self._sides.items()}
        if before != after:
            self._changed()

    def withdraw(self) -> None:
        pass

    def forget(self) -> None:
        for _, remove in self._sides.values():
            remove()
        self._sides.clear()
        self._changed()

    def _beside(self, module: torch.nn.Module, *, rank: int) -> Side:
        if module in self._sides:
            side, remove = self._sides[module]
            if side.fits(module, rank):
                return side
            remove()
            self._changed()
        side = Side(module, capacity=-(-rank // RANK_STEP) * RANK_STEP, device=self._device())
        forward = _convolution if hasattr(module, "kernel_size") else _linear
        # Adapters read the input in 16 bit, so a kernel in front shall not quantise it.
        members = {"takes": None} if isinstance(module, QuantLinear) else {}
        remove = give_class(module, {"forward": forward(type(module)), "vivace_side": side, **members})
        self._sides[module] = (side, remove)
        return side


def _linear(stock: type[Any]) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = stock.forward(self, x)
        self.vivace_side.add_to(out, x)
        return out

    return forward


def _convolution(stock: type[Any]) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        side = self.vivace_side
        h = self._conv_forward(x, side.down, None)  # [B, R, ...]
        if side.strengths is not None:
            h = h * side.rows(x.shape[0]).view(x.shape[0], -1, *[1] * (x.ndim - 2))
        out = stock.forward(self, x)
        out = out + (side.up @ h.flatten(2)).view_as(out)
        return out if side.bias is None else out + side.bias.view(-1, *[1] * (x.ndim - 2))

    return forward


def _form(module: torch.nn.Module) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape of a module's weight, and the type it computes in."""
    if isinstance(module, QuantLinear):
        return (module.out_features, module.in_features), module.dtype
    weight = module.get_parameter("weight")
    return tuple(weight.shape), weight.dtype


def _strength_of(one: float | Mapping[str, float], adapter: str) -> float:
    return float(one.get(adapter, 1.0)) if isinstance(one, Mapping) else float(one)
