"""Tensors that travel together: one flat piece of host memory, one copy to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vivace.memory.pinned import hold
from vivace.quant.linear import QuantLinear

ALIGN = 256  # bytes: what the widest loads of kernels and copies want

Joined = Sequence[Sequence[torch.Tensor]]
"""Tensors that are read as one, each list in its order: they lie side by side wherever they are."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a group, and its place in the group's bytes."""

    tensor: torch.Tensor
    start: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return _span(self.shape, self.stride) * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        place = flat[self.start : self.start + self.nbytes]
        return place.view(self.dtype).as_strided(self.shape, self.stride)


class Group:
    """The tensors, views of `host` but for the time that they are somewhere else."""

    def __init__(
        self, tensors: Sequence[torch.Tensor], *, module: torch.nn.Module, pin: bool, joined: Joined = ()
    ) -> None:
        self.quantised = [layer for layer in module.modules() if isinstance(layer, QuantLinear)]
        self.home = [(tensor, tensor.device) for tensor in tensors]
        self.entries: list[Entry] = []
        end = 0
        for neighbours in _neighbours(tensors, joined):
            for tensor in neighbours:
                stride = tensor.stride() if len(neighbours) == 1 else _dense(tensor.shape)
                self.entries.append(Entry(tensor, end, tensor.shape, stride, tensor.dtype))
                end += self.entries[-1].nbytes
            end = -(-end // ALIGN) * ALIGN
        self.nbytes = end
        self.host = hold(end, pin=pin)
        self._views: dict[int, list[torch.Tensor]] = {}  # address of the bytes -> the tensors there
        for entry, view in zip(self.entries, self._views_of(self.host), strict=True):
            view.copy_(entry.tensor.data)
        self.point(self.host)

    def point(self, flat: torch.Tensor) -> None:
        """Let the tensors be views of `flat`."""
        for entry, view in zip(self.entries, self._views_of(flat), strict=True):
            entry.tensor.data = view
        for layer in self.quantised:
            # What it made of its weight may be a view of where that was.
            layer.cache.clear()

    def stay(self) -> None:
        """At home, with nothing held of where the tensors have been."""
        self.point(self.host)
        self._views = {self.host.data_ptr(): self._views_of(self.host)}

    def give_back(self) -> None:
        """Ordinary tensors again, where they were."""
        self.point(self.host)
        for tensor, device in self.home:
            tensor.data = tensor.data.clone() if device.type == "cpu" else tensor.data.to(device)

    def _views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        if flat.data_ptr() not in self._views:
            # Parameters that became tensors of inference mode would stay so after it.
            with torch.inference_mode(False):
                self._views[flat.data_ptr()] = [entry.view(flat) for entry in self.entries]
        return self._views[flat.data_ptr()]


def _neighbours(tensors: Sequence[torch.Tensor], joined: Joined) -> Iterator[Sequence[torch.Tensor]]:
    """The tensors, those that are `joined` in one list."""
    mine = {id(tensor) for tensor in tensors}
    runs = [run for run in joined if id(run[0]) in mine]
    assert all(id(tensor) in mine for run in runs for tensor in run), "what is joined travels together"
    inside = {id(tensor) for run in runs for tensor in run}
    yield from runs
    yield from ([tensor] for tensor in tensors if id(tensor) not in inside)


def _dense(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
