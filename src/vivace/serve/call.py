"""A module call that a request waits for, and how the calls of several requests become one and come apart again."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from vivace.request import Request as Scope

if TYPE_CHECKING:
    from vivace.serve.job import Job

PER_CALL = ("timestep", "t", "timesteps")
"""Arguments that a pipeline may give as one number for the whole call; joined, each row has its own."""

BUCKET = 64
"""Text tokens: calls go together whose texts end in the same bucket, and none computes more padding than one."""

Cat = Callable[[str, list[torch.Tensor]], torch.Tensor]
"""Concatenates the parts of the argument of that name."""

Digest = Callable[[torch.Tensor], Hashable]
"""Names a tensor's contents."""


class Unsplittable(TypeError):
    """An output that cannot be told apart by request."""


class Form(Protocol):
    """How calls of one kind become one call and its output comes apart again."""

    def describe(self, kwargs: Mapping[str, Any], *, digest: Digest) -> tuple[Hashable, int] | None:
        """What has to be equal for calls to go together, and the rows of this one; None where it has to go alone."""
        ...

    def join(self, calls: Sequence[Mapping[str, Any]], *, rows: Sequence[int], cat: Cat) -> dict[str, Any]:
        """The keyword arguments of one call that answers all of `calls`."""
        ...

    def split(self, out: Any, *, rows: Sequence[int]) -> list[Any]:
        """The parts of a joint call's output, one a call. Raises Unsplittable."""
        ...


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The form of a module's calls: which arguments do not simply have the batch as their first dimension.

    `padded` maps a text argument [B, T, D] to the argument of its mask [B, T]: behind what the mask says are words,
    any number of zeros leaves the output as it is. None stands for a list of texts that the module pads itself.
    """

    shared: frozenset[str] = frozenset()  # no batch: all requests of one call must have the same
    listed: frozenset[str] = frozenset()  # lists with one entry a row
    padded: Mapping[str, str | None] = field(default_factory=dict)

    def describe(self, kwargs: Mapping[str, Any], *, digest: Digest) -> tuple[Hashable, int] | None:
        """See Form."""
        rows = _rows(kwargs, self)
        if rows is None:
            return None
        masks = {mask for mask in self.padded.values() if mask}
        try:
            key = tuple(
                (name, self._padded(value) if name in self.padded else _describe(value, name, rows, self, digest))
                for name, value in sorted(kwargs.items())
                if name not in masks
            )
            hash(key)
        except TypeError:
            return None
        return key, rows

    def join(self, calls: Sequence[Mapping[str, Any]], *, rows: Sequence[int], cat: Cat) -> dict[str, Any]:
        """See Form."""
        calls = self._level(calls)
        return {name: _join([call.get(name) for call in calls], name, rows, self, cat) for name in calls[0]}

    def split(self, out: Any, *, rows: Sequence[int]) -> list[Any]:
        """See Form."""
        return split(out, rows)

    def _padded(self, value: Any) -> Hashable:
        """Of a text: everything but its length within the bucket."""
        if isinstance(value, list):
            return ("texts", frozenset((bucket(len(one)), *one.shape[1:], one.dtype, one.device) for one in value))
        return ("text", bucket(value.shape[1]), *value.shape[2:], value.dtype, value.device)

    def _level(self, calls: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The calls with texts of one length, where they differ: to the end of the bucket, so that shapes are few."""
        for name, mask in self.padded.items():
            if mask is None or name not in calls[0]:
                continue
            lengths = {call[name].shape[1] for call in calls}
            if len(lengths) > 1 or any(call.get(mask) is not None for call in calls):
                most = bucket(max(lengths)) if len(lengths) > 1 else max(lengths)
                calls = [{**call, **_pad(call[name], call.get(mask), name, mask, most)} for call in calls]
        return calls


def bucket(tokens: int) -> int:
    """The least length of a bucket that holds so many."""
    return -(-tokens // BUCKET) * BUCKET


def _pad(text: torch.Tensor, words: torch.Tensor | None, name: str, mask: str, most: int) -> dict[str, torch.Tensor]:
    words = text.new_ones(text.shape[:2], dtype=torch.bool) if words is None else words.bool()
    more = most - text.shape[1]
    return {name: F.pad(text, (0, 0, 0, more)), mask: F.pad(words, (0, more))}


@dataclass(eq=False, kw_only=True)
class Call:
    """One call of `module`, and whoever waits for it."""

    job: Job
    module: torch.nn.Module
    method: str
    compute: Callable[..., Any]
    kwargs: dict[str, Any]
    form: Form
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


def _describe(value: Any, name: str, rows: int, axes: Axes, digest: Digest) -> Hashable:
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


def _join(values: list[Any], name: str, rows: Sequence[int], axes: Axes, cat: Cat) -> Any:
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
