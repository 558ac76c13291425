"""A module call that a request waits for, and how the calls of several requests become one and come apart again."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vivace.request import Request as Scope

if TYPE_CHECKING:
    from vivace.serve.job import Job

PER_CALL = ("timestep", "t", "timesteps")
"""Arguments that a pipeline may give as one number for the whole call; joined, each row has its own."""


Cat = Callable[[str, list[torch.Tensor]], torch.Tensor]
"""Concatenates the parts of the argument of that name."""


class Unsplittable(TypeError):
    """An output that cannot be told apart by request."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Which arguments of a module's call do not simply have the batch as their first dimension."""

    shared: frozenset[str] = frozenset()  # no batch: all requests of one call must have the same
    listed: frozenset[str] = frozenset()  # lists with one entry a row


@dataclass(eq=False, kw_only=True)
class Call:
    """One call of `module`, and whoever waits for it."""

    job: Job
    module: torch.nn.Module
    method: str
    compute: Callable[..., Any]
    kwargs: dict[str, Any]
    axes: Axes
    scope: Scope | None  # what the layers around the denoiser remember for this request
    key: Hashable | None  # calls of equal keys go together; None: alone
    rows: int
    arrived: float = field(default_factory=time.monotonic)
    done: threading.Event = field(default_factory=threading.Event)
    out: Any = None
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    shared_by: int = 1  # requests in the call that answered it

    def finish(self, out: Any = None, *, error: BaseException | None = None) -> None:
        """Answer it; later answers are ignored: whoever waited is gone."""
        with self.lock:
            if not self.done.is_set():
                self.out, self.error = out, error
                self.done.set()


def describe(
    kwargs: Mapping[str, Any], *, axes: Axes, digest: Callable[[torch.Tensor], Hashable]
) -> tuple[Hashable, int] | None:
    """What has to be equal for calls to go together, and the rows of this one; None where it has to go alone."""
    rows = _rows(kwargs, axes)
    if rows is None:
        return None
    try:
        key = tuple((name, _describe(value, name, rows, axes, digest)) for name, value in sorted(kwargs.items()))
        hash(key)
    except TypeError:
        return None
    return key, rows


def join(calls: Sequence[Call], *, cat: Cat) -> dict[str, Any]:
    """The keyword arguments of one call that answers all of `calls`; `cat` makes one tensor of an argument's parts."""
    rows = [call.rows for call in calls]
    axes, names = calls[0].axes, calls[0].kwargs
    return {name: _join([call.kwargs[name] for call in calls], name, rows, axes, cat) for name in names}


def split(out: Any, rows: Sequence[int]) -> list[Any]:
    """The parts of a joint call's output, one a call. Raises Unsplittable."""
    total = sum(rows)
    if out is None or isinstance(out, bool | int | float | str):
        return [out] * len(rows)
    if isinstance(out, torch.Tensor):
        if out.ndim == 0 or out.shape[0] != total:
            raise Unsplittable(f"a tensor of shape {tuple(out.shape)} for {total} rows")
        return list(out.split(list(rows)))
    if isinstance(out, Mapping):
        parts = {name: split(value, rows) for name, value in out.items()}
        rebuilt = type(out) if hasattr(type(out), "__dataclass_fields__") else dict
        return [rebuilt(**{name: part[i] for name, part in parts.items()}) for i in range(len(rows))]
    if isinstance(out, list) and len(out) == total and not _has_rows(out, total):
        ends = itertools.accumulate(rows, initial=0)
        return [out[start:end] for start, end in itertools.pairwise(ends)]
    if isinstance(out, list | tuple):
        parts = [split(value, rows) for value in out]
        return [type(out)(part[i] for part in parts) for i in range(len(rows))]
    raise Unsplittable(f"a {type(out).__name__}")


def _has_rows(values: Sequence[Any], total: int) -> bool:
    return all(isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == total for value in values)


def _rows(kwargs: Mapping[str, Any], axes: Axes) -> int | None:
    for name, value in kwargs.items():
        if name in axes.listed and isinstance(value, list):
            return len(value)
        if isinstance(value, torch.Tensor) and value.ndim > 0 and name not in axes.shared:
            return value.shape[0]
    return None


def _describe(value: Any, name: str, rows: int, axes: Axes, digest: Callable[[torch.Tensor], Hashable]) -> Hashable:
    """Raises TypeError for what cannot be compared."""
    if isinstance(value, torch.Tensor):
        kind = (value.dtype, value.device)
        if _spreads(value, name):
            return ("rows", (), *kind)
        if name not in axes.shared and value.ndim > 0 and value.shape[0] == rows:
            return ("rows", value.shape[1:], *kind)
        return ("same", digest(value))
    if name in axes.listed and isinstance(value, list):
        return ("listed", frozenset(_describe(entry, "", 0, axes, _shape) for entry in value))
    if isinstance(value, Mapping):
        return ("dict", *((key, _describe(inner, key, rows, axes, digest)) for key, inner in value.items()))
    if isinstance(value, list | tuple):
        return (type(value), *(_describe(inner, name, rows, axes, digest) for inner in value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return (type(value), value)
    raise TypeError(type(value))


def _shape(tensor: torch.Tensor) -> Hashable:
    return (tuple(tensor.shape), tensor.dtype, tensor.device)


def _spreads(value: torch.Tensor, name: str) -> bool:
    return value.ndim == 0 and name in PER_CALL


def _join(values: list[Any], name: str, rows: list[int], axes: Axes, cat: Cat) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if _spreads(first, name):
            return torch.cat([value.expand(count) for value, count in zip(values, rows, strict=True)])
        if name not in axes.shared and first.ndim > 0 and first.shape[0] == rows[0]:
            return cat(name, values)
        return first
    if name in axes.listed and isinstance(first, list):
        return [entry for value in values for entry in value]
    if isinstance(first, Mapping):
        return {key: _join([value[key] for value in values], key, rows, axes, cat) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_join(list(inner), name, rows, axes, cat) for inner in zip(*values, strict=True))
    return first
