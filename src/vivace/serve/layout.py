"""Where the requests of a joint call are in what flows between a denoiser's blocks: learned by computing it twice.

What a prologue leaves for the blocks is the model's own business: streams, modulations, rotary tables, masks, some with
rows and some without. So a call's front is computed once as it is and once with all its rows doubled. What stays the
same has no rows; what comes out twice has them; anything else (rows in another order, say) and such calls go alone.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

KEPT = 128  # layouts that one model remembers
CLOSE = 0.02  # relative distance of the same rows computed in another batch: 8-bit products are that far apart


class Kind(Enum):
    """Of what is no tensor with rows."""

    ALIKE = "the same for all"
    COUNTED = "the number of rows"
    LISTED = "a list with an entry a row"


class NoLayout(TypeError):
    """Something between the blocks whose rows cannot be told."""


@dataclass(frozen=True)
class Rows:
    """A tensor with `times` entries along its first dimension for each row: a video's frames are some."""

    times: int


Plan = Rows | Kind | dict[str, Any] | tuple[Any, ...]
"""Of one value, or of each value in a container."""


@dataclass(frozen=True)
class Layout:
    """Of a `State`'s parts. Skips have as many entries a row as the stream."""

    x: Plan
    text: Plan
    context: Plan

    @classmethod
    def of(cls, once: Mapping[str, Any], twice: Mapping[str, Any], *, rows: int) -> Layout:
        """From a state of `rows` rows, and the state of the same rows twice. Raises NoLayout."""
        return cls(*(_plan(once[name], twice[name], rows) for name in ("x", "text", "context")))

    def plan(self, state: Mapping[str, Any]) -> dict[str, Plan]:
        """For the fields of a state as it is now."""
        plans: dict[str, Plan] = dict.fromkeys(("x", "start"), self.x)
        plans |= {"text": self.text, "skips": (self.x,) * len(state.get("skips", ())), "context": self.context}
        # What a fused block computed ahead only holds for the very tensors it was made of.
        return {name: plans[name] for name in state if name != "ahead"}


class Layouts:
    """The layouts of one model, by what decides them."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Layout | None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def get(self, key: Hashable) -> Layout | None:
        """None also where it is known that there is none."""
        return self._known.get(key)

    def keep(self, key: Hashable, layout: Layout | None) -> None:
        with self._lock:
            self._known[key] = layout
            while len(self._known) > KEPT:
                self._known.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


def describe(plan: Plan, value: Any) -> Hashable:
    """What has to be equal for values to be joined. Raises TypeError for what cannot be compared."""
    if value is None:
        return None
    if isinstance(plan, Rows):
        return (tuple(value.shape[1:]), value.dtype, value.device)
    if isinstance(plan, dict):
        return tuple((name, describe(inner, value[name])) for name, inner in plan.items())
    if isinstance(plan, tuple):
        return tuple(describe(inner, one) for inner, one in zip(plan, value, strict=True))
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    return plan if plan in (Kind.COUNTED, Kind.LISTED) else (type(value), _frozen(value))


def join(plan: Plan, values: Sequence[Any]) -> Any:
    """One value with the rows of all; where they have none, the first."""
    first = values[0]
    if first is None or plan is Kind.ALIKE:
        return first
    if isinstance(plan, Rows):
        return torch.cat(list(values))
    if plan is Kind.COUNTED:
        return sum(values)
    if plan is Kind.LISTED:
        return [entry for value in values for entry in value]
    if isinstance(plan, dict):
        return {name: join(inner, [value[name] for value in values]) for name, inner in plan.items()}
    joined = [join(inner, several) for inner, several in zip(plan, zip(*values, strict=True), strict=True)]
    return _like(first, joined)


def split(plan: Plan, value: Any, *, rows: Sequence[int]) -> list[Any]:
    """The parts of a joint value, one a call, each in memory of its own: a cache may keep one for many steps."""
    if value is None or plan is Kind.ALIKE:
        return [value] * len(rows)
    if isinstance(plan, Rows):
        return [part.clone() for part in value.split([plan.times * count for count in rows])]
    if plan is Kind.COUNTED:
        return [value // sum(rows) * count for count in rows]
    if plan is Kind.LISTED:
        ends = itertools.accumulate(rows, initial=0)
        return [value[start:end] for start, end in itertools.pairwise(ends)]
    if isinstance(plan, dict):
        parts = {name: split(inner, value[name], rows=rows) for name, inner in plan.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(rows))]
    several = [split(inner, one, rows=rows) for inner, one in zip(plan, value, strict=True)]
    return [_like(value, [part[i] for part in several]) for i in range(len(rows))]


def _plan(once: Any, twice: Any, rows: int) -> Plan:
    """Raises NoLayout."""
    if isinstance(once, torch.Tensor) and isinstance(twice, torch.Tensor):
        return _plan_of_tensor(once, twice, rows)
    if isinstance(once, Mapping) and isinstance(twice, Mapping) and once.keys() == twice.keys():
        return {name: _plan(once[name], twice[name], rows) for name in once}
    if isinstance(once, list | tuple) and type(once) is type(twice):
        if len(once) == len(twice):
            return tuple(_plan(*pair, rows) for pair in zip(once, twice, strict=True))
        if len(once) == rows and _same(list(twice), [*once, *once]):
            return Kind.LISTED
    if isinstance(once, int) and isinstance(twice, int) and (once, 2 * once) == (rows, twice):
        return Kind.COUNTED
    if type(once) is type(twice) and _same(once, twice):
        return Kind.ALIKE
    raise NoLayout(type(once).__name__)


def _plan_of_tensor(once: torch.Tensor, twice: torch.Tensor, rows: int) -> Plan:
    if once.shape == twice.shape and _close(once, twice):
        return Kind.ALIKE
    times, odd = divmod(len(once), rows) if once.ndim else (0, 1)
    doubled = times and not odd and twice.shape == (2 * len(once), *once.shape[1:])
    # Each half by itself: rows in another order must not pass for rows.
    if doubled and all(_close(once, half) for half in twice.chunk(2)):
        return Rows(times)
    raise NoLayout(f"a tensor of shape {tuple(once.shape)} for {rows} rows, {tuple(twice.shape)} for twice as many")


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    one, other = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (one, other))
    # Also where both are infinite, as in masks.
    apart = torch.where(one == other, 0, one - other).norm()
    return bool(apart <= CLOSE * one.nan_to_num(0, 0, 0).norm())


def _like(one: Any, values: list[Any]) -> Any:
    """A list or tuple of the type of `one`; a named tuple takes its values apart."""
    return type(one)._make(values) if hasattr(type(one), "_make") else type(one)(values)


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):
        return False


def _frozen(value: Any) -> Hashable:
    """A plain value that can be compared, lists and dicts too."""
    if isinstance(value, Mapping):
        return tuple((name, _frozen(inner)) for name, inner in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
