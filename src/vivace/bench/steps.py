"""What a step cache costs a step: `python -m vivace.bench.steps [FAMILY[:variant]]` writes
benchmarks/<date>-<gpu>-steps.json.

One denoiser at true size with random weights, in a loop like a pipeline's: time of a computed step under each policy
beside no cache, and of a skipped one. Policies whose decision reads a signal are given a threshold at which a step is
skipped nearly always, or never. On a GPU times are the device's, taken over a whole step; the host's are beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vivace.accelerate import accelerate, acceleration_of, restore
from vivace.bench.clock import synchronize
from vivace.bench.results import code, record, rows_of
from vivace.bench.subject import build, inputs_of
from vivace.bench.workload import Workload, workload_of
from vivace.cache import parse
from vivace.cache.calibration import Plan
from vivace.cache.planned import Planned
from vivace.errors import InputError, first_line
from vivace.load import resolve_device, resolve_dtype
from vivace.machine import machine
from vivace.request import open_request

logger = logging.getLogger(__name__)

STEPS = 16  # of one request; the first four are not counted
WARM = 4
REQUESTS = 3
EVERY_OTHER = tuple(range(0, STEPS, 2))


def policies() -> dict[str, Any]:
    """By name: every policy whose skipped step has a bar, and none, which comes first and last."""
    weights = {step: (-0.5, 1.5) if step > 1 else (1.0,) for step in range(1, STEPS, 2)}
    plan = Plan(steps=STEPS, scheduler="FlowMatchEulerDiscreteScheduler", compute=EVERY_OTHER, weights=weights)
    spelled = {
        "FirstBlock, all computed": "firstblock:threshold=0.000000001",
        "FirstBlock": "firstblock:threshold=1000",
        "TeaCache": "teacache:threshold=1000",
        "TaylorSeer": "taylorseer:interval=2",
        "fixed mask": f"steps:compute={'+'.join(map(str, EVERY_OTHER))},order=1",
    }
    named = {name: parse(one) for name, one in spelled.items()}
    return {"none": None, "Planned": Planned(plans=(plan,)), **named, "none again": None}


def measured(denoiser: Any, workload: Workload, policy: Any, *, preset: str) -> dict[str, Any]:
    """Seconds of a computed and of a skipped step; raises InputError where the model cannot take the policy."""
    accelerate(denoiser, preset, cache=policy)
    try:
        arguments = inputs_of(denoiser, workload)
        spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for _ in range(REQUESTS):
            for step, span in enumerate(_request(denoiser, arguments)):
                if step >= WARM:
                    spans[span[0]].append(span[1:])
        return {
            kind: {
                "steps": len(found),
                "device_s": statistics.median(one[0] for one in found),
                "host_s": statistics.median(one[1] for one in found),
            }
            for kind, found in (("computed", spans[False]), ("skipped", spans[True]))
            if found
        }
    finally:
        restore(denoiser)


@torch.no_grad()
def _request(denoiser: Any, arguments: Mapping[str, Any]) -> list[tuple[bool, float, float]]:
    """Each step of one request: whether it was skipped, its seconds on the device and the host's until it was told."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, device = FlowMatchEulerDiscreteScheduler(), denoiser.device
    scheduler.set_timesteps(STEPS)
    times: Any = scheduler.timesteps
    found = []
    with open_request(scheduler=scheduler) as scope:
        for number, moment in enumerate(times):
            at = arguments["timestep"].new_full(arguments["timestep"].shape, float(moment) / 1000)
            scope.step = number
            synchronize(device)
            began = time.perf_counter()
            denoiser(**{**arguments, "timestep": at})
            told = time.perf_counter() - began
            synchronize(device)
            found.append((_skipped(denoiser, number), time.perf_counter() - began, told))
    return found


def _skipped(denoiser: Any, step: int) -> bool:
    acceleration = acceleration_of(denoiser)
    assert acceleration is not None
    (lane,) = acceleration.target.lanes.values()
    return lane.cache is not None and step in lane.cache.tally.last.steps


def command_of(workload: Workload, preset: str) -> str:
    """What measures it again."""
    tiny = " --tiny" if workload.tiny else ""
    return f"python -m vivace.bench.steps {workload.family}:{workload.variant} --preset {preset}{tiny}"


def run(
    workload: Workload,
    *,
    preset: str,
    rows: dict[str, Any] | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """A row for each policy that `rows` lacks; all of it goes to `on_row` after each."""
    known = rows if rows is not None else {}
    result = {
        "command": command_of(workload, preset),
        "machine": machine(),
        "code": code(),
        "workload": workload.to_dict(),
        "rows": known,
    }
    wanted = {name: policy for name, policy in policies().items() if name not in known}
    denoiser = build(workload) if wanted else None
    for name, policy in wanted.items():
        try:
            known[name] = measured(denoiser, workload, policy, preset=preset)
        except InputError as error:
            known[name] = {"refused": first_line(error)}
        if "none" in known and "computed" in known[name]:
            whole = known["none"]["computed"]["device_s"]
            known[name]["computed_over_none"] = known[name]["computed"]["device_s"] / whole - 1
        logger.info("%s: %s", name, known[name])
        on_row(result)
    return result


def main(arguments: Sequence[str]) -> None:
    logging.basicConfig(level=logging.INFO)
    asked = argparse.ArgumentParser(prog="python -m vivace.bench.steps", description=__doc__)
    asked.add_argument("family", nargs="?", default="flux:dev", metavar="FAMILY[:variant]")
    asked.add_argument("--preset", default="exact")
    asked.add_argument("--tiny", action="store_true", help="a tiny model, to try the bench itself")
    asked.add_argument("-o", "--output", type=Path, default=record("steps"), help="the JSON; what it has is kept")
    given = asked.parse_args(arguments)
    place = resolve_device(None)
    dtype = str(resolve_dtype(None, place)).removeprefix("torch.")
    workload = workload_of(given.family, device=str(place), dtype=dtype, tiny=given.tiny)
    try:
        rows = rows_of(given.output, command=command_of(workload, given.preset))
    except InputError as error:
        asked.error(str(error))
    given.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(result: dict[str, Any]) -> None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    run(workload, preset=given.preset, rows=rows, on_row=keep)


if __name__ == "__main__":
    main(sys.argv[1:])
