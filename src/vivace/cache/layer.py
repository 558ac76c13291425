"""The cache layer: hands every denoiser call to the policy, with what it remembers of this request and branch."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from vivace import request
from vivace.cache.call import Call, Schedule
from vivace.cache.policy import Policy
from vivace.cache.tally import Count, Tally, mark
from vivace.memory.here import bring_of
from vivace.passes.target import device_of
from vivace.request import Request

if TYPE_CHECKING:
    from vivace.family import Family, Split
    from vivace.lane import Run

BRANCHES = 8
"""Guidance branches that one request remembers; the least recently used go first."""

CONDITIONS = ("encoder_hidden_states", "encoder_hidden_states_image", "cap_feats")
"""Arguments that are the same tensors at every step of one branch, and others in another branch."""


@dataclass(eq=False)
class Branch:
    """One guidance branch of one request: what the policy remembers, of which step, and under which conditions."""

    memory: Any
    conditions: list[torch.Tensor]  # held, because an address names a tensor only as long as it lives
    step: int


class Cache:
    """The cache of one denoiser. What it remembers lives in the request and ends with it; here are only counts."""

    def __init__(self, policy: Policy, denoiser: torch.nn.Module, *, family: Family | None, spelled: str) -> None:
        self.policy = policy
        self.spelled = spelled  # as it was asked for, before the model's own values were filled in
        self.denoiser = denoiser
        self.family = family
        self.tally = Tally()
        self.idle: dict[str, int] = {}  # why calls were computed without asking the policy -> how many

    def __call__(
        self,
        kwargs: Mapping[str, Any],
        *,
        forward: Callable[..., Any],
        run: Run,
        split: Split | None,
        served_by: str,
        check: Callable[..., None],
    ) -> Any:
        """One call of the denoiser: its arguments, its result. `split` is the fused blocks', where these serve."""
        place = _place(kwargs)
        if isinstance(place, str):
            check()
            self.idle[place] = self.idle.get(place, 0) + 1
            return run("forward", forward, **kwargs)
        now, schedule = place
        branches, shared, count = self._request(now)
        call = Call(
            step=now.step, schedule=schedule, branch=now.branch, batch=now.batch, shared=shared,
            kwargs=kwargs, forward=forward, run=run, split=split or self.stock, check=check,
        )  # fmt: skip
        return self._serve(call, branches, key=_key(now, served_by, schedule, kwargs), count=count)

    def to_dict(self) -> dict[str, Any]:
        """What happened so far as plain values, ready for JSON."""
        return {"policy": self.spelled, **self.tally.to_dict(), "idle": dict(self.idle)}

    def release(self) -> None:
        """Forget what was built from the denoiser as it was."""
        self.__dict__.pop("stock", None)

    @functools.cached_property
    def stock(self) -> Split | None:
        """The stock Split; None for an unknown family."""
        if self.family is None:
            return None
        split, signal = self.family.split(self.denoiser), self.family.signal
        split = replace(split, bring=bring_of(self.denoiser))
        return replace(split, signal=functools.partial(signal, self.denoiser)) if signal else split

    def _serve(self, call: Call, branches: OrderedDict[Any, Branch], *, key: Any, count: Count) -> Any:
        branch = branches.pop(key, None)
        if branch is not None and branch.step == call.step:
            # Not the next step but the same once more, from a callback or a second opinion: none of the policy's.
            branches[key] = branch
            return call.whole()
        # A branch that was left out for some steps starts anew: what it remembers is from too long ago.
        if branch is None or branch.step != call.step - 1:
            branch, call.first = Branch(self.policy.fresh(), _conditions(call.kwargs), step=call.step), True
        device = device_of(self.denoiser)
        begin = mark(device)
        out = self.policy.serve(branch.memory, call)
        branch.step = call.step
        # Put back only now: a call that failed leaves no half-updated memory behind.
        branches[key] = branch
        if len(branches) > BRANCHES:
            branches.popitem(last=False)
        self.tally.add(count, step=call.step, skipped=call.skipped, span=(begin, mark(device)))
        if not call.skipped:
            self.tally.peak_bytes = max(self.tally.peak_bytes, sum(nbytes(b.memory) for b in branches.values()))
        return out

    def _request(self, now: Request) -> tuple[OrderedDict[Any, Branch], dict[str, Any], Count]:
        if self not in now.memo:
            now.memo[self] = (OrderedDict(), {}, self.tally.begin())
        return now.memo[self]


def schedule_of(now: Request, kwargs: Mapping[str, Any]) -> Schedule | None:
    """The steps of a request, read once from its scheduler (a host read); None where there is no scheduler."""
    if now.times:
        return Schedule(times=tuple(now.times))
    timesteps = getattr(now.scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
        return None
    known = now.memo.get("schedule")
    if known is None or known[0] is not timesteps:
        times = tuple(map(float, timesteps.tolist()))
        first = _first(now, times, kwargs)
        # The tensor is held so that its identity stays its own; another one is another schedule.
        known = now.memo["schedule"] = (
            timesteps,
            Schedule(times=times[first:], first=first, scheduler=type(now.scheduler).__name__),
        )
    return known[1]


def _first(now: Request, times: tuple[float, ...], kwargs: Mapping[str, Any]) -> int:
    """Where in the scheduler's list this request began: what the pipeline told the scheduler, else by the time."""
    begun = getattr(now.scheduler, "begin_index", None)
    if begun is not None:
        return begun
    time = kwargs.get("timestep")
    if now.step or time is None:
        return 0
    value = float(time.flatten()[0]) if isinstance(time, torch.Tensor) else float(time)
    # Some pipelines hand over thousandths.
    found = [i for i, t in enumerate(times) if any(abs(t - v) <= 1e-3 * abs(t) for v in (value, 1000 * value))]
    return found[0] if found else 0


def _place(kwargs: Mapping[str, Any]) -> tuple[Request, Schedule] | str:
    """The request whose step such a call is, and that one's schedule; else why it is nobody's."""
    now = request.current()
    if now is None:
        return "the denoiser was called outside a pipeline (open a vivace.request for a loop of your own)"
    schedule = schedule_of(now, kwargs)
    if schedule is None:
        return "the pipeline has no scheduler with timesteps"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    return "the request ran past its schedule" if now.step >= len(schedule) else (now, schedule)


def _conditions(kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return _tensors([kwargs.get(name) for name in CONDITIONS])


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    # Most arguments are tensors: only others are worth the time of a tree.
    leaves = (leaf for value in values for leaf in ([value] if isinstance(value, torch.Tensor) else tree_leaves(value)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _key(now: Request, served_by: str, schedule: Schedule, kwargs: Mapping[str, Any]) -> tuple:
    """What must be the same for two calls to be steps of one branch."""
    # What the split makes of the arguments once says nothing more.
    given = [value for name, value in kwargs.items() if name != "once"]
    shapes = tuple((t.shape, t.dtype) for t in _tensors(given))
    words = tuple((name, value) for name, value in kwargs.items() if isinstance(value, str | bool))
    # Tensors made in inference mode keep no count of changes in place.
    prompts = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in _conditions(kwargs))
    return now.branch, served_by, schedule, shapes, words, prompts


def nbytes(thing: Any) -> int:
    """Bytes of every tensor that a policy's memory holds."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, Mapping):
        return sum(map(nbytes, thing.values()))
    if isinstance(thing, list | tuple | set) or type(thing).__name__ == "deque":
        return sum(map(nbytes, thing))
    return sum(map(nbytes, vars(thing).values())) if hasattr(thing, "__dict__") else 0
