"""Planned: the schedule that a calibration found best for this model, scheduler and number of steps.

Which steps are computed was chosen by dynamic programming on the errors that estimates have in exact runs; the outputs
of the others are sums of the last three, with weights fitted for every step. Everything is known before the run:
nothing is read from the device, the whole forward is one graph, and memory is a few latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.calibration import NODES, Plan, calibration_of
from vivace.cache.policy import Holds, Policy
from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.cache.call import Call, Schedule
    from vivace.cache.trail import Trail
    from vivace.passes.target import Target


@dataclass(kw_only=True, eq=False)
class Memory:
    """The last computed outputs, and the step of the scheduler's list with which they begin."""

    trail: Trail
    since: int | None = None


@dataclass(frozen=True, kw_only=True)
class Planned(Policy):
    """Compute the steps of a calibrated plan, and estimate the others from the last computed ones."""

    name: ClassVar[str] = "planned"
    holds: ClassVar[Holds] = Holds(outputs=NODES)

    file: str | None = None
    """The calibration, from `vivace calibrate`; None: the one that ships with the model."""

    computed: float = 0.5
    """Share of the steps to compute; the plan nearest to it is taken."""

    plans: tuple[Plan, ...] = field(default=(), repr=False)
    """Filled in from the calibration."""

    most: ClassVar = {"computed": 1}

    def refuses(self, target: Target) -> str | None:
        if self.plans:
            return None
        calibration = calibration_of(target, file=self.file)
        if calibration is None:
            return "no calibration is known for this model; make one with vivace calibrate, or use firstblock"
        return None if calibration.plans else "its calibration has no plan; use firstblock"

    def bind(self, target: Target) -> Planned:
        if self.plans:
            return self
        calibration = calibration_of(target, file=self.file)
        assert calibration is not None
        return replace(self, plans=calibration.plans)

    def plan(self, schedule: Schedule) -> Plan:
        """The plan for such a run. Raises InputError where none was calibrated."""
        steps, scheduler = schedule.whole, schedule.scheduler
        fitting = [p for p in self.plans if p.fits(steps=steps, scheduler=scheduler, times=schedule.times)]
        if not fitting:
            known = ", ".join(sorted({f"{plan.steps} steps of {plan.scheduler}" for plan in self.plans}))
            raise InputError(
                f"no plan for {steps} steps of {scheduler} at these noise levels; this calibration has {known}: "
                f"use these, calibrate with --steps {steps}, or use firstblock"
            )
        return min(fitting, key=lambda plan: abs(len(plan.compute) / plan.steps - self.computed))

    def fresh(self) -> Memory:
        from vivace.cache.trail import Trail

        return Memory(trail=Trail(NODES))

    def computes(self, step: int, schedule: Schedule) -> bool:
        return schedule.first + step in self.plan(schedule).compute

    def serve(self, memory: Memory, call: Call) -> Any:
        from vivace.cache.steps import serve_step

        plan = self.plan(call.schedule)
        step = call.schedule.first + call.step
        memory.since = since = step if memory.since is None else memory.since
        return serve_step(self, memory.trail, call, estimate=lambda: memory.trail.sum(plan.factors(step, since=since)))
