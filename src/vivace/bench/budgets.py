"""Whole runs within a budget of device memory: `python -m vivace.bench.budgets [CASE ...]` writes
benchmarks/<date>-<gpu>-budgets.json, a row as soon as it is there; run again it goes on.

Every way of a case runs in a process of its own that may take no more than the budget (1 GB of it is the CUDA
context's), at true size with random weights, text encoders included: ours, exact and with the preset fast, in 8 bits;
diffusers' group offload, block by block and leaf by leaf; and without a limit, for the resident step, stock and as
ours. A streamed step should take at most 1.3 times the longer of the resident step (`of_bound`: of the accelerated one
in the same precision; `of_stock_bound`) and its bytes over the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from vivace.bench.process import Children
from vivace.bench.results import code, record, rows_of
from vivace.errors import InputError
from vivace.machine import machine
from vivace.memory.placement import CONTEXT, GIB

logger = logging.getLogger(__name__)

COMMAND = "python -m vivace.bench.budgets"
STEPS = 4
FAST_STEPS = 8  # the attention of the first and last two is exact, and the others' is first computed, then recorded
LIMIT = 400.0  # seconds that one way of a case may take
LEAST = 40.0  # seconds of the budget under which nothing is begun: a pipeline at true size takes that long to draw


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model within one budget."""

    family: str
    variant: str | None
    budget: int  # GB
    size: tuple[int, int] = (1024, 1024)


CASES = {
    "qwen-image-24": Case(family="qwen_image", variant=None, budget=24),
    "flux-16": Case(family="flux", variant="dev", budget=16),
    "flux-12": Case(family="flux", variant="dev", budget=12),
    "sdxl-6": Case(family="sdxl", variant=None, budget=6),
    "sd3.5-medium-8": Case(family="sd3", variant="3.5-medium", budget=8),
    "wan-14b-24": Case(family="wan", variant="2.1-t2v-14b", budget=24, size=(832, 480)),
}
RESIDENT: dict[str, str] = {"vivace": "resident", "vivace fast": "resident fast"}
"""Our ways, and those whose step is their bound."""
PEERS = ("group offload", "leaf offload")
WAYS = ("resident", "vivace", "resident fast", "vivace fast", *PEERS)


def pipeline(case: Case, *, on_host: bool) -> Any:
    """The pipeline; weights are drawn on the device, which is quicker, and leave it component by component."""
    import diffusers
    import torch

    from vivace.families import FAMILIES
    from vivace.families.tokenizers import t5_tokenizer
    from vivace.memory.leaving import Leaving

    family = FAMILIES[case.family]
    variant = family.variant(case.variant)
    small: Any = family.tiny(variant.pipeline)
    slots = [family.denoisers[0], "vae", *family.text_encoders, *variant.text_encoders]
    parts, leave = dict(small.components), Leaving()
    for slot, part in parts.items():
        if slot in slots:
            drawn = family.full(case.variant, component=slot, device="cuda", dtype=torch.bfloat16)
            parts[slot] = drawn._apply(leave) if on_host else drawn
            torch.cuda.empty_cache()
        elif isinstance(part, torch.nn.Module):
            parts[slot] = None  # a second expert, or an image encoder, which the published model lacks
    if "tokenizer_3" in parts:
        parts["tokenizer_3"] = t5_tokenizer()
    if "boundary_ratio" in parts:
        parts["boundary_ratio"] = None
    kind, config = family.scheduler
    if kind:
        parts["scheduler"] = getattr(diffusers, kind)(**{**config, **variant.scheduler})
    return type(small)(**parts)


def bandwidth() -> float:
    """Bytes a second from page-locked host memory to the device."""
    import torch

    source, target = torch.empty(GIB, dtype=torch.uint8).pin_memory(), torch.empty(GIB, dtype=torch.uint8).cuda()
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, GIB / (time.perf_counter() - start))
    return best


def measure(name: str, way: str) -> dict[str, Any]:
    """One case, one way, in this process."""
    import torch

    case = CASES[name]
    unlimited = way in RESIDENT.values()
    pipe = pipeline(case, on_host=not unlimited)
    rate = bandwidth()
    torch.cuda.empty_cache()
    if not unlimited:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((case.budget * GIB - CONTEXT) / total)
    torch.cuda.reset_peak_memory_stats()
    stock = {"stock_step_s": picture(pipe, case, steps=STEPS)["step_s"]} if way == "resident" else {}
    start, steps = time.perf_counter(), FAST_STEPS if "fast" in way else STEPS
    given = place(pipe, case, way)
    ready = time.perf_counter() - start
    row = {
        "given": given,
        "ready_s": ready,
        "steps": steps,
        **picture(pipe, case, steps=steps),
        **stock,
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "bandwidth": rate,
    }
    return row | (facts(pipe, steps=steps) if way in RESIDENT else {})


def picture(pipe: Any, case: Case, *, steps: int) -> dict[str, float]:
    """Seconds of a whole call, and of its quickest step."""
    import torch

    from vivace.families import FAMILIES

    variant = FAMILIES[case.family].variant(case.variant)
    video = {"num_frames": variant.frames} if variant.frames > 1 else {}
    marks: list[float] = []

    def mark(*arguments: Any) -> dict[str, Any]:
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    width, height = case.size
    start = time.perf_counter()
    pipe(
        "a frog holding a sign, cinematic, soft light",
        **{"width": width, "height": height, "num_inference_steps": steps, "output_type": "pt", **video},
        callback_on_step_end=mark,
    )
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    return {"run_s": whole, "step_s": min(later - earlier for earlier, later in pairwise(marks))}


def place(pipe: Any, case: Case, way: str) -> dict[str, Any]:
    """Put the weights where this way wants them; those of a resident one are on the device. Returns what was asked."""
    from vivace.accelerate import accelerate

    if way in PEERS:
        return offload(pipe, by_blocks=way == "group offload")
    given = {"preset": "fast" if "fast" in way else "exact"}
    if way in RESIDENT:
        given["vram"] = f"{case.budget}GB"
    accelerate(pipe, given["preset"], **{name: value for name, value in given.items() if name != "preset"})
    return given


def offload(pipe: Any, *, by_blocks: bool) -> dict[str, Any]:
    """diffusers' group offload as its documentation has it for little memory, and the VAE in tiles and slices.

    The text encoders go leaf by leaf in any case, whose blocks lie too deep for diffusers to find: each would come
    whole. Of the VAE in tiles it advises against copies beside the computation.
    """
    import torch
    from diffusers.hooks import apply_group_offloading

    from vivace.accelerate import DENOISER_NAMES

    devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    beside, given = {"use_stream": True, "record_stream": True}, dict[str, Any]()
    components: dict[str, Any] = pipe.components
    for name, part in components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        given[name] = {"offload_type": "leaf_level", **(beside if name != "vae" else {})}
        if by_blocks and name in DENOISER_NAMES:
            given[name] = {"offload_type": "block_level", "num_blocks_per_group": 1, **beside}
        apply = getattr(part, "enable_group_offload", None) or partial(apply_group_offloading, part)
        apply(**devices, **given[name])
    for method in ("enable_tiling", "enable_slicing"):
        if hasattr(pipe.vae, method):
            getattr(pipe.vae, method)()
            given[f"vae.{method}"] = True
    return given


def facts(pipe: Any, *, steps: int = STEPS) -> dict[str, Any]:
    """What was planned."""
    from vivace.accelerate import acceleration_of

    acceleration = acceleration_of(pipe)
    plan = acceleration.target.placement if acceleration else None
    assert plan is not None
    calls = {name: dict(lane.calls) for name, lane in acceleration.target.lanes.items()} if acceleration else {}
    # Guidance in two calls moves everything twice.
    per_step = sum(sum(counts.values()) for counts in calls.values()) / steps
    return {
        "plan": str(plan).splitlines(),
        "planned_peak": plan.peak,
        "moved_per_step": plan.moved_per_call * per_step,
        "calls": calls,
    }


def bounds(ours: Mapping[str, Any], resident: Mapping[str, Any]) -> dict[str, float]:
    """How many times the longer of a resident step and of moving a step's bytes ours takes."""
    moving = ours["moved_per_step"] / ours["bandwidth"]
    steps = {"of_bound": resident["step_s"], "of_stock_bound": resident.get("stock_step_s")}
    return {name: ours["step_s"] / max(step, moving) for name, step in steps.items() if step is not None}


def run(
    names: Sequence[str],
    *,
    ways: Sequence[str] = WAYS,
    rows: dict[str, Any] | None = None,
    limit: float = LIMIT,
    budget: float | None = None,
    measure: Callable[..., dict[str, Any]] | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Every case, every way, each in its own process; a way that fails says so in its row, and is tried again.

    `rows` has what is known, and all of it goes to `on_row` after every way. `limit` seconds are for one way; after
    `budget` seconds no further way is begun.
    """
    known, began = rows if rows is not None else {}, time.monotonic()
    result = {"command": COMMAND, "machine": machine(), "code": code(), "rows": known}
    with Children("vivace.bench.budgets", together=2) as children:
        measure = measure or partial(apart, children)
        for name, way in product(names, ways):
            row = known.setdefault(name, {"case": asdict(CASES[name])})
            rest = limit if budget is None else min(limit, budget - (time.monotonic() - began))
            if "step_s" in row.get(way, {}) or rest < LEAST:
                continue
            row[way] = measure(name, way, seconds=rest)
            logger.info("%s, %s: %s", name, way, row[way])
            for ours, resident in RESIDENT.items():
                if all("step_s" in row.get(one, {}) for one in (ours, resident)):
                    row[ours] |= bounds(row[ours], row[resident])
            on_row(result)
    return result


def apart(children: Children, name: str, way: str, *, seconds: float) -> dict[str, Any]:
    """One case, one way, in a process of its own, which ends within so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        ended = children.run(["--measure", name, way, str(path)], seconds=seconds)
        if path.is_file():
            return json.loads(path.read_text("utf-8"))
    logger.warning("%s, %s:\n%s", name, way, ended.said)
    said = [line for line in ended.said.splitlines() if line.strip()]
    # CUDA's errors end with advice.
    last = next((line for line in reversed(said) if "Error" in line), said[-1] if said else "no message")
    last = last.replace(f"{Path.cwd()}/", "")
    return {"failed": last[:240] if ended.code is not None else f"not finished in {seconds:.0f} s"}


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO)
    if arguments[:1] == ["--measure"]:
        name, way, path = arguments[1:]
        Path(path).write_text(json.dumps(measure(name, way)), "utf-8")
        return
    asked = argparse.ArgumentParser(prog="python -m vivace.bench.budgets", description=__doc__)
    asked.add_argument("cases", nargs="*", metavar="CASE", help=f"all of {', '.join(CASES)}")
    asked.add_argument("-o", "--output", type=Path, default=record("budgets"), help="the JSON; what it has is kept")
    asked.add_argument("--ways", default=",".join(WAYS), help=f"which of {', '.join(WAYS)}")
    asked.add_argument("--limit-s", type=float, default=LIMIT, help="seconds that one way may take")
    asked.add_argument("--budget-s", type=float, help="seconds after which no way is begun; the rest next time")
    given = asked.parse_args(arguments)
    ways = [way.strip() for way in given.ways.split(",")]
    for asked_for, known in ((given.cases, CASES), (ways, WAYS)):
        if unknown := [one for one in asked_for if one not in known]:
            asked.error(f"there is no {unknown[0]!r}; known are {', '.join(known)}")
    try:
        rows = rows_of(given.output, command=COMMAND)
    except InputError as error:
        asked.error(str(error))
    given.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(result: dict[str, Any]) -> None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    times = {"limit": given.limit_s, "budget": given.budget_s}
    run(given.cases or list(CASES), ways=ways, rows=rows, on_row=keep, **times)


if __name__ == "__main__":
    main(sys.argv[1:])
