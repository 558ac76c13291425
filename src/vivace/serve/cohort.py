"""Requests that go on sharing calls: what does not change from step to step is joined, and prepared, once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from vivace.request import Request as Scope
from vivace.serve.call import Call
from vivace.serve.job import Job

MOST = 8  # cohorts that are remembered; guidance in two calls takes two


@dataclass(eq=False)
class Cohort:
    """The requests of a joint call, as one request to the layers around the denoiser."""

    scope: Scope = field(default_factory=Scope)
    joined: dict[str, tuple[list[torch.Tensor], list[int], torch.Tensor]] = field(default_factory=dict)

    def at(self, scope: Scope | None) -> Scope:
        """Its request at the step of one of those who share the call: what matters of the step is the same for all."""
        return replace(self.scope, step=scope.step, scheduler=scope.scheduler) if scope else self.scope

    def cat(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The parts as one tensor: the very one of the last call, where these are the very parts of the last call."""
        # Inference tensors keep no count of changes in place.
        versions = [-1 if part.is_inference() else part._version for part in parts]
        before, counted, whole = self.joined.get(name, ([], [], None))
        same = len(before) == len(parts) and all(a is b for a, b in zip(before, parts, strict=True))
        if whole is None or not same or counted != versions or -1 in versions:
            whole = torch.cat(parts)
            self.joined[name] = (parts, versions, whole)
        return whole


class Cohorts:
    """The cohorts of one worker, the least recently used forgotten first."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], Cohort] = OrderedDict()

    def of(self, calls: Sequence[Call]) -> Cohort:
        """The cohort of these calls, a new one where they have not been together."""
        branch = calls[0].scope.branch if calls[0].scope else None
        key = (id(calls[0].module), branch, *(call.job for call in calls))
        cohort = self._known.setdefault(key, Cohort())
        self._known.move_to_end(key)
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        return cohort

    def leave(self, job: Job) -> None:
        """Forget the cohorts of a job that is over, and the memory they hold."""
        for key in [key for key in self._known if job in key]:
            self._known.pop(key).scope.memo.clear()
