"""LoRA beside the linears: low-rank products added to their outputs, with strengths that may change at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from vivace.errors import InputError
from vivace.lora.adapters import Factor, Place, Strength
from vivace.one_off import give_class, stock_class
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
        self._tables: dict[int, torch.Tensor] = {}  # of strengths, by N: each keeps its place

    @property
    def kind(self) -> tuple[int, bool]:
        """What a recorded graph of it depends on besides addresses: how many strengths, and whether a bias."""
        return 0 if self.strengths is None else len(self.strengths), self.bias is None

    def lie(self, *, down: torch.Tensor, up: torch.Tensor) -> Callable[[], None]:
        """Let the factors lie in `down` and `up`; the undo gives them memory of their own again."""
        down.copy_(self.down)
        up.copy_(self.up)
        self.down, self.up = down, up

        def undo() -> None:
            if self.up is up:
                self.down, self.up = (t.clone(memory_format=torch.contiguous_format) for t in (down, up))

        return undo

    def fits(self, module: torch.nn.Module, rank: int) -> bool:
        (outputs, *inputs), dtype = _form(module)
        same = [self.up.shape[0], *self.down.shape[1:]] == [outputs, *inputs] and self.up.dtype == dtype
        return same and rank <= self.capacity

    def fill(self, factors: Sequence[Factor], strength: Strength) -> None:
        """Hold these factors from now on."""
        uniform = strength if isinstance(strength, int | float) else 1.0
        row = 0
        for factor in factors:
            rows = slice(row, row := row + factor.down.shape[0])
            self.down[rows].copy_(factor.down)
            up = factor.up.to(self.up.device)
            up = up if up.dtype == self.up.dtype else up.float()  # torch multiplies in fp32 and rounds once
            torch.mul(up.flatten(1), factor.scale * uniform, out=self.up[:, rows])
        if row < self.capacity:
            self.down[row:].zero_()
            self.up[:, row:].zero_()
        biases = [f.bias.to(self.up.device, torch.float32) * f.scale for f in factors if f.bias is not None]
        if not biases:
            self.bias = None
        else:
            self.bias = self.up.new_empty(len(self.up)) if self.bias is None else self.bias
            self.bias.copy_(torch.stack(biases).sum(0) * uniform)
        if isinstance(strength, int | float):
            self.strengths = None
            return
        table = torch.zeros(len(strength), self.capacity)
        for number, one in enumerate(strength):
            parts = [torch.full((f.down.shape[0],), _strength_of(one, f.adapter)) for f in factors]
            table[number, :row] = torch.cat(parts)
        kept = self._tables.setdefault(
            len(table), torch.empty_like(table, device=self.down.device, dtype=self.down.dtype)
        )
        self.strengths = kept.copy_(table)

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add what a linear's adapters make of `x` `[B, ..., in]` to its output `out` `[B, ..., out]`, in place."""
        h = x.to(self.down.dtype).reshape(-1, x.shape[-1]) @ self.down.t()  # [B ..., R]
        if self.strengths is not None:
            h.view(len(out), -1, self.capacity).mul_(self.rows(len(out)).unsqueeze(1))
        # A GEMM that adds to what is there.
        rows = out.view(-1, out.shape[-1])
        rows.addmm_(h, self.up.t())
        if self.bias is not None:
            rows += self.bias

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


def plain(module: Any) -> bool:
    """Whether a module computes as torch's linear, but for adapters beside it: its weight may be read."""
    return stock_class(type(module)) is torch.nn.Linear


def hidden(name: str, module: torch.nn.Module) -> str | None:
    """Why nothing can be added beside a layer, or None: layerwise casting and group offload call what they found."""
    return f"{name} carries a hook, behind which nothing is added" if "forward" in vars(module) else None


class Sides:
    """Adapters beside their modules: no weight gets another value."""

    def __init__(
        self,
        *,
        changed: Callable[[], None],
        device: Callable[[], torch.device],
        outdated: Callable[[], None],
    ) -> None:
        self._changed = changed  # recorded graphs hold no longer
        self._outdated = outdated  # nor does what was built from the modules
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

    def refuses(self, place: Place) -> str | None:
        return hidden(place.name, place.module)

    @torch.no_grad()
    def settle(self, places: Iterable[Place], strength: Strength) -> None:
        wanted = {place.module: factors for place in places if (factors := place.factors())}
        before = {module: side for module, (side, _) in self._sides.items()}
        kinds = [side.kind for side in before.values()]
        for module in [module for module in self._sides if module not in wanted]:
            self._sides.pop(module)[1]()
        for module, factors in wanted.items():
            self._beside(module, rank=sum(factor.down.shape[0] for factor in factors)).fill(factors, strength)
        after = {module: side for module, (side, _) in self._sides.items()}
        if before != after:
            self._outdated()
        elif kinds != [side.kind for side in before.values()]:
            self._changed()

    def withdraw(self) -> None:
        pass

    def forget(self) -> None:
        for _, remove in self._sides.values():
            remove()
        (self._outdated if self._sides else self._changed)()
        self._sides.clear()

    def _beside(self, module: torch.nn.Module, *, rank: int) -> Side:
        if module in self._sides:
            side, remove = self._sides[module]
            if side.fits(module, rank):
                return side
            remove()
        side = Side(module, capacity=-(-rank // RANK_STEP) * RANK_STEP, device=self._device())
        forward = _convolution if hasattr(module, "kernel_size") else _linear
        # Adapters read the input in 16 bit, so a kernel in front shall not quantise it.
        members = {"takes": None} if isinstance(module, QuantLinear) else {"_save_to_state_dict": _saving(type(module))}
        remove = give_class(module, {"forward": forward(type(module)), "vivace_side": side, **members})
        self._sides[module] = (side, remove)
        return side


def _linear(stock: type[Any]) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = stock.forward(self, x)
        self.vivace_side.add_to(out, x)
        return out

    return forward


def _saving(stock: type[Any]) -> Callable[..., None]:
    def _save_to_state_dict(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        stock._save_to_state_dict(self, destination, prefix, keep_vars)
        # A weight that shares its rows with adapters is a view with gaps, which no file takes.
        if not keep_vars:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()

    return _save_to_state_dict


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
