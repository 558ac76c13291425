"""Calibration: what fits one model best, measured on some prompts and judged on others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import exp, isfinite, log
from typing import Any
from zlib import crc32

import torch

from vivace.accelerate import accelerate, acceleration_of, restore
from vivace.cache import fit
from vivace.cache.calibration import NODES, Plan, fingerprint
from vivace.cache.first_block import FirstBlock
from vivace.cache.planned import Planned
from vivace.cache.policy import Policy
from vivace.cache.record import Change, Record, Run, recorded
from vivace.cache.schedule import Choice, Errors, schedules, uniform
from vivace.cache.steps import Steps
from vivace.config import Config
from vivace.errors import InputError
from vivace.evals.sample import draw
from vivace.scheduler import use_scheduler

PROBES = 8
"""Steps at which the gain is measured; between them it is interpolated."""

TRIES = 8
"""Prompts by whose real runs one of several plans is chosen."""

SOLVER = "unipc"
"""The best solver that few steps can be spent with: what a plan must beat too."""

Tell = Callable[[str], None]


@dataclass(kw_only=True, eq=False)
class Bench:
    """A pipeline, how it is called, and the exact runs of some prompts."""

    pipe: Any
    steps: int
    seed: int
    call: dict[str, Any]
    tell: Tell
    config: Config
    exact: dict[str, torch.Tensor] = field(default_factory=dict)  # prompt -> final latent
    _under: tuple[Policy | None, ...] = field(default=(), init=False)  # the policy of the last run; empty: of none

    @contextmanager
    def solved_by(self, name: str) -> Iterator[None]:
        """Another scheduler within the block; raises InputError where the model cannot be run by it."""
        acceleration = acceleration_of(self.pipe)
        family = acceleration.target.family if acceleration else None
        if family is None:
            raise InputError(f"what a {type(self.pipe).__name__} predicts is not known, so {name} is not tried")
        self._under = ()
        restore(self.pipe)
        stock = self.pipe.scheduler
        try:
            use_scheduler(self.pipe, name, prediction=family.prediction)
            yield
        finally:
            self._under = ()
            restore(self.pipe)
            self.pipe.scheduler = stock
            accelerate(self.pipe, self.config)

    def run(self, prompt: str, policy: Policy | None, *, steps: int | None = None, outputs: bool = False) -> Run:
        """The record of one run under `policy`; the noise belongs to the prompt."""
        if not self._under or self._under[0] is not policy:
            accelerate(self.pipe, self.config, cache=policy)
            self._under = (policy,)
        seeds = [self.seed + crc32(prompt.encode())]
        with recorded(self.pipe.scheduler, outputs=outputs) as run, torch.no_grad():
            draw(self.pipe, [prompt], steps=steps or self.steps, seeds=seeds, output_type="latent", **self.call)
        return run

    def error(self, prompts: Sequence[str], policy: Policy | None, *, steps: int | None = None) -> float:
        """Mean relative error of the final latent."""
        errors = []
        for prompt in prompts:
            latents, exact = self.run(prompt, policy, steps=steps).latents, self.exact[prompt]
            assert latents is not None
            errors.append(((latents.float() - exact).norm() / exact.norm()).item())
        return sum(errors) / len(errors)

    def computed(self) -> float:
        """Share of calls that the last run computed."""
        acceleration = acceleration_of(self.pipe)
        assert acceleration is not None
        counts = [lane.cache.tally.last for lane in acceleration.target.lanes.values() if lane.cache is not None]
        return sum(c.computed for c in counts) / max(1, sum(c.computed + c.skipped for c in counts))


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    shares: Sequence[float] = (0.25, 1 / 3, 0.5, 2 / 3),
    held_out: float = 0.25,
    seed: int = 0,
    tell: Tell = lambda line: None,
    **call: Any,
) -> dict[str, Any]:
    """The calibration of `pipe` at `steps` steps as a document for JSON (see `calibration.read`), with its evidence.

    `shares` are the shares of steps to compute. A part that is no better on held-out prompts than a constant choice is
    left out and named under `refused`. Raises InputError for fewer than four prompts or two steps, for a pipeline that
    takes no prompt, and where nothing is left.
    """
    if steps < 2:
        raise InputError(f"calibration needs a run with steps to skip, got {steps}; give 2 steps or more")
    if len(set(prompts)) < 4:
        raise InputError(f"calibration needs at least 4 different prompts to hold some out, got {len(set(prompts))}")
    order = sorted(set(prompts))
    random.Random(seed).shuffle(order)
    cut = max(2, round(len(order) * held_out))
    test, train = order[:cut], order[cut:]
    with _as_it_was(pipe):
        before = acceleration_of(pipe)
        config = before.target.config if before else Config()
        bench = Bench(pipe=pipe, steps=steps, seed=seed, call=call, tell=tell, config=config)
        errors, log_ = observe(bench, train, test)
        parts, refused = {}, {}
        for name, part in (
            ("planned", lambda: _planned(bench, errors, train, test, shares)),
            ("teacache", lambda: fit.teacache(*_changes(log_, train, test))),
            ("firstblock", lambda: _firstblock(bench, log_, train, test, shares, calls=errors.steps)),
        ):
            parts[name], refused[name] = part()
        about = _about(bench, train, test)
    parts = {name: part for name, part in parts.items() if part}
    refused = {name: reason for name, reason in refused.items() if reason}
    if not parts:
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return {**about, **parts, "refused": refused}


def _about(bench: Bench, train: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    from vivace import __version__
    from vivace.machine import machine

    acceleration = acceleration_of(bench.pipe)
    assert acceleration is not None
    return {
        "denoiser": fingerprint(next(iter(acceleration.target.denoisers.values()))),
        "pipeline": type(bench.pipe).__name__,
        "steps": bench.steps,
        "prompts": {"fitted": len(train), "held_out": len(test)},
        "call": {name: value for name, value in bench.call.items() if isinstance(value, str | int | float | bool)},
        "seed": bench.seed,
        "vivace": __version__,
        "machine": machine(),
    }


@contextmanager
def _as_it_was(pipe: Any) -> Iterator[None]:
    acceleration = acceleration_of(pipe)
    try:
        yield
    finally:
        restore(pipe)
        if acceleration is not None:
            accelerate(pipe, acceleration.target.config)


def observe(bench: Bench, train: Sequence[str], test: Sequence[str]) -> tuple[Errors, dict[str, list[Change]]]:
    """Exact runs of all prompts, and real runs that skip one step each on the first prompts."""
    accelerate(bench.pipe, bench.config)
    acceleration = acceleration_of(bench.pipe)
    assert acceleration is not None
    family = acceleration.target.family
    inside = family is not None and "up_blocks" not in family.blocks
    record = Record(signals=family is not None and family.signal is not None, inside=inside)
    log_: dict[str, list[Change]] = {}
    products = []
    for number, prompt in enumerate((*train, *test)):
        bench.tell(f"exact runs: {number + 1} of {len(train) + len(test)}")
        run = bench.run(prompt, record, outputs=True)
        assert run.latents is not None
        if not run.latents.isfinite().all():
            raise InputError(f"the exact run of {prompt!r} ends in latents that are not finite; load in another dtype")
        log_[prompt] = list(record.log)
        record.log.clear()
        bench.exact[prompt] = run.latents.float().clone()
        if prompt in train:
            flat = torch.stack(run.outputs).flatten(1).double() / run.latents.float().norm().item()
            products.append(flat @ flat.T)
    known = Errors(
        times=tuple(run.times),
        products=torch.stack(products).mean(0),
        gain=[1.0] * len(run.times),
        effect=run.effects(),
    )
    return replace(known, gain=_gains(bench, known, train[: max(1, min(4, len(train)))])), log_


def _gains(bench: Bench, errors: Errors, prompts: Sequence[str]) -> list[float]:
    """For every step, the final latent's relative error per error of that step's output: measured, interpolated."""
    count = errors.steps
    probes = sorted({round(2 + i * (count - 3) / (PROBES - 1)) for i in range(PROBES)}) if count > 3 else [1]
    measured: dict[int, float] = {}
    for number, step in enumerate(probes):
        bench.tell(f"gain of an error: {number + 1} of {len(probes)} steps")
        others = "+".join(str(i) for i in range(count) if i != step)
        final = bench.error(prompts, Steps(compute=others, order=0))
        local = errors.change(step, since=step - 1)
        if final > 0 and local > 0:
            measured[step] = final / local
    if not measured:
        raise InputError("skipping any single step changes nothing in the final latent; is the model loaded right?")
    return gains(measured, errors.effect)


def gains(measured: Mapping[int, float], effects: Sequence[float]) -> list[float]:
    """The gain at every step, from that at some: its effect, times what later steps make of it, interpolated.

    The effect itself may jump from step to step: a schedule's last step is often a tiny one.
    """
    later = {step: gain / abs(effects[step]) for step, gain in measured.items() if effects[step]}
    return [
        abs(effect) * _interpolated(later, step) if effect and later else _interpolated(measured, step)
        for step, effect in enumerate(effects)
    ]


def _interpolated(values: Mapping[int, float], step: int) -> float:
    """Linear in the logarithm, constant beyond the ends."""
    below = max((s for s in values if s <= step), default=min(values))
    above = min((s for s in values if s >= step), default=max(values))
    if below >= above:
        return values[below]
    place = (step - below) / (above - below)
    return exp(log(values[below]) * (1 - place) + log(values[above]) * place)


def _planned(
    bench: Bench, errors: Errors, train: Sequence[str], test: Sequence[str], shares: Sequence[float]
) -> tuple[list[dict[str, Any]], str]:
    """A plan for every share of steps where it beats an even mask and fewer steps on held-out prompts; else why not."""
    found = [schedules(errors, back=back) for back in (1, NODES)]
    scheduler = type(bench.pipe.scheduler).__name__
    wanted, possible = {round(share * errors.steps) for share in shares}, found[0].keys() - {errors.steps}
    rows, worse = [], []
    for count in sorted(wanted & possible):
        bench.tell(f"plans: {count} of {errors.steps} steps")
        # What is nearly as good by sums of errors can differ by far in real runs.
        plans = {one[count].compute: plan_of(one[count], errors, scheduler=scheduler) for one in found}
        tried = {compute: bench.error(train[:TRIES], Planned(plans=(plan,))) for compute, plan in plans.items()}
        plan = plans[min(plans, key=tried.__getitem__)]
        measured, controls = bench.error(test, Planned(plans=(plan,))), _controls(bench, errors, count, test)
        row = {
            "steps": errors.steps, "scheduler": scheduler, "compute": list(plan.compute),
            "weights": {str(step): [round(one, 6) for one in sum_] for step, sum_ in plan.weights.items()},
            "times": list(errors.times), "error": measured, "error_fitted": tried[plan.compute], "controls": controls,
        }  # fmt: skip
        if measured < min(controls.values()):
            rows.append(row)
        else:
            worse.append(f"{count} steps: error {measured:.3g}, the best of them {min(controls.values()):.3g}")
    reasons = [f"no better than even masks and fewer steps at {'; '.join(worse)}"] if worse else []
    if beyond := sorted(wanted - possible):
        reach = f"from {min(possible)} to {max(possible)}" if possible else "none"
        reasons.append(f"there are no plans of {beyond} computed steps of {errors.steps}, only {reach}")
    return rows, "; ".join(reasons)


def plan_of(choice: Choice, errors: Errors, *, scheduler: str) -> Plan:
    """What Planned runs by; `scheduler` is the class name of the one that was observed."""
    return Plan(steps=errors.steps, scheduler=scheduler, compute=choice.compute, weights=choice.weights)


def _controls(bench: Bench, errors: Errors, count: int, prompts: Sequence[str]) -> dict[str, float]:
    """The errors of what a plan of `count` evaluations has to beat."""
    even = "+".join(map(str, uniform(errors.steps, count)))
    found = {f"even mask, order {o}": bench.error(prompts, Steps(compute=even, order=o)) for o in (0, 1)}
    # Heun's method evaluates most of its steps twice.
    fewer = max(1, round(count * bench.steps / errors.steps))
    found[f"{fewer} steps"] = bench.error(prompts, None, steps=fewer)
    with suppress(InputError), bench.solved_by(SOLVER):
        found[f"{count} steps of {SOLVER}"] = bench.error(prompts, None, steps=count)
    return found


def _changes(
    log_: dict[str, list[Change]], train: Sequence[str], test: Sequence[str]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(signal, output) changes of the fitted and of the held-out prompts."""

    def pairs(prompts: Sequence[str]) -> list[tuple[float, float]]:
        changes = (change for prompt in prompts for change in log_[prompt])
        found = [(c.signal, c.output) for c in changes if c.signal is not None and c.output is not None]
        # What was zero at one step and is not at the next has changed infinitely.
        return [pair for pair in found if all(map(isfinite, pair))]

    return pairs(train), pairs(test)


def _firstblock(
    bench: Bench,
    log_: dict[str, list[Change]],
    train: Sequence[str],
    test: Sequence[str],
    shares: Sequence[float],
    *,
    calls: int,
) -> tuple[list[dict[str, Any]], str]:
    """A threshold for every share where it beats an even mask with as many of a run's `calls`; else the reason."""
    runs = fit.series([log_[prompt] for prompt in train])
    if not runs:
        return [], "the stream changes shape from block to block"
    rows, worse = [], []
    for threshold in sorted({fit.threshold(runs, share) for share in shares}, reverse=True):
        bench.tell(f"firstblock: threshold {threshold:.3g}")
        errors, used, policy = [], [], FirstBlock(threshold=threshold)
        for prompt in test:
            errors.append(bench.error([prompt], policy))
            used.append(bench.computed())
        computed = sum(used) / len(used)
        even = "+".join(map(str, uniform(calls, max(1, round(computed * calls)))))
        control = bench.error(test, Steps(compute=even))
        measured = sum(errors) / len(errors)
        row = {
            "threshold": threshold,
            "computed_percent": round(100 * computed),
            "error": measured,
            "even_mask": control,
        }
        if measured < control and computed < 1:
            # Another threshold may compute as many steps; the lower one comes later, and is the nearer to exact.
            rows = [other for other in rows if other["computed_percent"] != row["computed_percent"]] + [row]
        else:
            worse.append(f"threshold {threshold:.3g}: error {measured:.3g}, even mask {control:.3g}")
    return rows, "" if not worse else f"no better than an even mask at {'; '.join(worse)}"
