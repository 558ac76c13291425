"""Training steps at true size on random weights: what a batch of every stage takes, with and without the fast lane.

    python recipes/distill/true_size.py sdxl -o benchmarks/<date>-<gpu>-distill-true-size-sdxl.json
    python recipes/distill/true_size.py sd3 -o benchmarks/<date>-<gpu>-distill-true-size-sd3.json

A stock teacher and one for each preset train side by side, in turns: whole batches (data, rollout, losses, backward,
the optimizers' steps), the same for all, with about as many teacher calls as the stage's average one; what is missing
or too much is added at the same batch's time a call. One of each stage warms up, then rounds follow until `--repeats`
or `--budget-s` ends them; what was left out is said. Within a batch that counts nothing is waited for; one more batch
of each stage, which counts for nothing else, says where the time goes: each part's seconds from a device at rest to a
device at rest, and how many of them the host took to launch it. Where both are nearly the same the device waits for
the host. A contestant's peak is without what the others hold. Nothing is downloaded: denoiser, VAE and text encoders
have the published shapes and random weights, the pictures are the built-in model's world at the config's size. SD3
runs without T5. `--set student.compile=true` compiles all students. `--tiny` tries the script itself anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from vivace.config import PRESETS
from vivace.distill import Data, DistillConfig, Records, read_config
from vivace.distill.plan import teacher_calls
from vivace.distill.student import beside
from vivace.distill.trainer import make_accelerator, make_training
from vivace.distill.training import Training
from vivace.families import FAMILIES
from vivace.families.tokenizers import clip_tokenizer
from vivace.machine import machine

BEGAN = time.monotonic()
STOCK = "stock"
LOOKED_AT = 500  # batches of a stage, for one with as many teacher calls as the average one


def pipeline(name: str, *, device: str) -> Any:
    """A pipeline at true size with random weights: SDXL, or SD3.5-medium with its two CLIPs."""
    import diffusers

    family = FAMILIES[name]
    encoders = {
        slot: family.full(component=slot, device=device) for slot in family.text_encoders if slot != "text_encoder_3"
    }
    parts: dict[str, Any] = {**encoders, "vae": family.full(component="vae", device=device)}
    parts |= {slot.replace("text_encoder", "tokenizer"): clip_tokenizer() for slot in encoders}
    parts[family.denoisers[0]] = family.full(device=device)
    if name == "sd3":
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        kind, facts = family.scheduler
        parts["scheduler"] = getattr(diffusers, kind)(**facts)
    return getattr(diffusers, family.pipelines[0])(**parts)


class Contestant:
    """A training around a teacher of its own over the same weights, and what its batches took."""

    def __init__(self, config: DistillConfig, pipe: Any) -> None:
        self.before, self.began = held(), time.monotonic()
        # Modules of its own, over the same memory: what is done to them reaches no other contestant.
        parts = {
            name: beside(part, apart=True) if isinstance(part, nn.Module) else part
            for name, part in pipe.components.items()
        }
        self.training = make_training(config, make_accelerator(config, Path(config.output)), pipe=type(pipe)(**parts))
        self.inner: Any = self.training.target
        self.training.target = self.target  # type: ignore[method-assign]
        stages = range(len(config.stages))
        self.numbers, self.calls = zip(*(typical(self.training, number) for number in stages), strict=True)
        self.marks, self.end = (Mark(), Mark()), torch.zeros(0)
        self.rows: list[list[dict[str, Any]]] = [[] for _ in stages]
        self.parts: list[dict[str, Any]] = [{} for _ in stages]
        self.peak = 0
        for stage in stages:
            self.batch(stage)
        self.cold = time.monotonic() - self.began
        # The weights and moments that this training alone has.
        self.own = held() - self.before
        self.took = [rows.pop()["seconds"] for rows in self.rows]
        self.peak = 0

    def target(self, *args: Any) -> torch.Tensor:
        """The training's rollout, between two marks, and where it ended."""
        before = Mark()
        self.end = self.inner(*args)
        self.marks = before, Mark()
        return self.end

    def batch(self, stage: int) -> None:
        """One whole batch of a stage."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.training.done = self.numbers[stage]
        start = now()
        losses = self.training.batch()
        seconds = now() - start
        if self.training.done == self.numbers[stage]:
            raise SystemExit(f"stage {stage + 1} made no step, its losses are {losses}; nothing was measured")
        rollout = self.marks[1].since(self.marks[0])
        more = teacher_calls(self.training.config, self.training.config.stages[stage]) / self.calls[stage] - 1
        self.rows[stage].append(
            {
                "seconds": seconds,
                "rollout": rollout / seconds,
                "expected": seconds + more * rollout,
                "end": self.end.cpu(),
            }
        )
        self.peak = max(self.peak, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0

    def look(self, stage: int) -> None:
        """One more batch of a stage, in which every part begins and ends with a device at rest."""
        training, found = self.training, {}

        def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = now()
                made = part(*args, **kwargs)
                launched, total = time.perf_counter() - start, now() - start
                before = found.get(name, {"seconds": 0.0, "of them launching": 0.0})
                found[name] = {
                    "seconds": before["seconds"] + total,
                    "of them launching": before["of them launching"] + launched,
                }
                return made

            return run

        places: list[tuple[Any, str, str]] = [
            (training, "draw", "data, text and VAE"),
            (training.actors.recorder, "record", "of that text"),
            (training.actors.pipe.vae, "encode", "of that VAE"),
            (training, "target", "rollout"),
            (training, "updates", "losses and backward"),
            (training, "_backward", "of that backward"),
            (training, "step", "optimizer"),
        ]
        with ExitStack() as stack:
            for place, method, name in places:
                stack.callback(put_back, place, method, vars(place).get(method))
                setattr(place, method, timed(name, getattr(place, method)))
            training.done = self.numbers[stage]
            whole = timed("whole batch", training.batch)
            whole()
        self.parts[stage] = found


def put_back(place: Any, name: str, before: Any) -> None:
    """Undo what was set on an instance over its class's own."""
    if before is None:
        delattr(place, name)
    else:
        setattr(place, name, before)


class Mark:
    """A moment in the device's work, for which nobody waits."""

    def __init__(self) -> None:
        self.time = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event is not None:
            self.event.record()

    def since(self, before: Mark) -> float:
        """Seconds of the device's time, once both lie behind it."""
        if self.event is None or before.event is None:
            return self.time - before.time
        return before.event.elapsed_time(self.event) / 1000


def typical(training: Training, number: int) -> tuple[int, int]:
    """The stage's batch whose rollout is nearest to the expected one, and its teacher calls."""
    stages = training.config.stages
    first, stage = [0, *accumulate(one.batches for one in stages)][number], stages[number]
    expected = teacher_calls(training.config, stage)
    calls = {}
    for batch in range(first, first + min(stage.batches, LOOKED_AT)):
        # What a batch draws depends on nothing but its number.
        training.done = batch
        calls[batch] = stage.steps - training.objective.place(stage, training.choices())
    best = min(calls, key=lambda batch: abs(calls[batch] - expected))
    return best, calls[best]


def now() -> float:
    """The time when all work on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def held() -> int:
    """Bytes that are allocated on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def measure(contestants: dict[str, Contestant], *, repeats: int, budget: float) -> list[str]:
    """Rounds over the stages, in which every contestant has its turn, first or later. Returns what the budget cut."""
    everyone = list(contestants.values())
    for number, stage in product(range(repeats), range(len(everyone[0].rows))):
        if time.monotonic() - BEGAN + sum(one.took[stage] for one in everyone) > budget:
            return [f"rounds {number + 1} to {repeats} from stage {stage + 1} on"]
        shift = number % len(everyone)
        for one in everyone[shift:] + everyone[:shift]:
            one.batch(stage)
    return []


def table(contestants: dict[str, Contestant], config: DistillConfig) -> dict[str, Any]:
    """What was measured, as plain values."""
    found: dict[str, Any] = {}
    others = {name: sum(o.own for o in contestants.values() if o is not one) for name, one in contestants.items()}
    for name, one in contestants.items():
        stages = [
            row(one, contestants[STOCK].rows[number], number, config)
            for number in range(len(config.stages))
            if one.rows[number]
        ]
        found[name] = {"stages": stages, "seconds until warm": one.cold, "where the time goes": one.parts}
        if torch.cuda.is_available():
            found[name]["peak, GiB"] = (one.peak - others[name]) / 2**30
    return found


def row(one: Contestant, stock: list[dict[str, Any]], number: int, config: DistillConfig) -> dict[str, Any]:
    """A stage of one contestant: medians, the range, and how it stands to stock's batches of the same rounds."""
    batches = one.rows[number]
    both = list(zip(batches, stock, strict=True))
    seconds = [batch["expected"] for batch in batches]
    faster = [other["expected"] / batch["expected"] for batch, other in both]
    apart = [float((batch["end"] - other["end"]).norm() / other["end"].norm()) for batch, other in both]
    return {
        "stage": number + 1,
        "batches": len(batches),
        "teacher calls": one.calls[number],
        "seconds": median(batch["seconds"] for batch in batches),
        "teacher calls, expected": teacher_calls(config, config.stages[number]),
        "seconds with as many": median(seconds),
        "their range": [min(seconds), max(seconds)],
        "rollout": median(batch["rollout"] for batch in batches),
        "pictures/s": config.batch / median(seconds),
        "times as fast": median(faster),
        "its range": [min(faster), max(faster)],
        "rollout's end, distance from stock's": median(apart),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sdxl", "sd3"))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--presets", nargs="+", default=["exact", "fast"], choices=PRESETS, help="of the teacher, beside stock"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=280, help="seconds from the start within which it ends")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    config = read_config(asked.model, assignments=asked.assignments)
    config = dataclasses.replace(config, data=Data(kind="builtin"), records=Records(trackers=()))
    if asked.tiny:
        config = dataclasses.replace(config, size=(64, 64))
    pipe = FAMILIES[asked.model].tiny() if asked.tiny else pipeline(asked.model, device="cuda")
    contestants: dict[str, Contestant] = {}
    for preset in (None, *asked.presets):
        one = contestants[preset or STOCK] = Contestant(dataclasses.replace(config, accelerate=preset), pipe)
        print(f"{preset or STOCK} is warm after {one.cold:.0f} s", flush=True)
    left = measure(contestants, repeats=asked.repeats, budget=asked.budget_s)
    for stage, one in product(range(len(config.stages)), contestants.values()):
        if time.monotonic() - BEGAN + 2 * one.took[stage] < asked.budget_s:
            one.look(stage)
    found = table(contestants, config)
    about = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "config": config.to_dict()}
    if asked.output:
        asked.output.write_text(json.dumps({**about, **found, "left out": left}, indent=2) + "\n", encoding="utf-8")
    for name, facts in found.items():
        for stage in facts["stages"]:
            print(
                name, *(f"{key} {value:.4g}" for key, value in stage.items() if not isinstance(value, list)), sep="  "
            )
        for stage, parts in enumerate(facts["where the time goes"], 1):
            told = (f"{part} {took['seconds']:.3f} ({took['of them launching']:.3f})" for part, took in parts.items())
            print(name, f"stage {stage}", *told, sep="  ")
        print(name, *(f"{key} {value:.4g}" for key, value in facts.items() if isinstance(value, float)), sep="  ")
    print(*(f"left out for the budget: {what}" for what in left), sep="\n")


if __name__ == "__main__":
    main()
