"""The last outputs of a step sequence, and the next one by extrapolation in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class Trail:
    """The last `length` values with their times; a value is any tree of tensors, such as a denoiser's output."""

    def __init__(self, length: int) -> None:
        self._entries: deque[tuple[float, list[Any]]] = deque(maxlen=length)
        self._spec: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, value: Any, *, time: float, own: bool = False) -> None:
        """Remember `value`, computed at `time`. An older value of the same time is of no more use and goes.

        It is copied, because whoever gets a denoiser's output may write into it, unless it is the caller's `own`.
        """
        leaves, spec = tree_flatten(value)
        if not own:
            leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        if spec != self._spec:
            self._entries.clear()
            self._spec = spec
        if self._entries and self._entries[-1][0] == time:
            self._entries.pop()
        self._entries.append((time, leaves))

    @property
    def newest(self) -> Any:
        """The newest value itself, to be read only. Raises IndexError when empty."""
        return tree_unflatten(self._entries[-1][1], self._spec)

    def at(self, time: float, *, order: int) -> Any:
        """The value at `time` by the polynomial of at most `order` through the newest values: Lagrange's form, fp32.

        Order 0 is the newest value; with too few values the order is what they allow. Raises IndexError when empty.
        """
        times = [entry[0] for entry in self._entries][-order - 1 :]
        return self.sum(weights(times, time))

    def sum(self, factors: Sequence[float]) -> Any:
        """The newest values times `factors`, the newest last, summed in fp32. Raises IndexError for too few values."""
        if not 0 < len(factors) <= len(self._entries):
            raise IndexError(f"{len(factors)} values are wanted, {len(self._entries)} are there")
        columns = zip(*(entry[1] for entry in list(self._entries)[-len(factors) :]), strict=True)
        return tree_unflatten([_blend(column, factors) for column in columns], self._spec)


def weights(times: Sequence[float], time: float) -> list[float]:
    """Lagrange's weights of values at distinct `times` for the value at `time`."""
    found = []
    for i, own in enumerate(times):
        weight = 1.0
        for j, other in enumerate(times):
            if i != j:
                weight *= (time - other) / (own - other)
        found.append(weight)
    return found


def _blend(values: Sequence[Any], factors: Sequence[float]) -> Any:
    newest = values[-1]
    if not isinstance(newest, torch.Tensor) or not newest.is_floating_point():
        return newest
    # New memory also where there is one value: the caller may write into what it gets.
    total = newest.float() * factors[-1]
    for value, factor in zip(values[:-1], factors[:-1], strict=True):
        total.add_(value, alpha=factor)
    return total.to(newest.dtype)
