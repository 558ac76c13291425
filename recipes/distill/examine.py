"""The few-step student of the built-in model against its teacher, on the same held-out captions and noise.

    python recipes/distill/examine.py runs/builtin/result -o benchmarks/<date>-<gpu>-distill-builtin.json

The teacher draws with its own steps and guidance, and in four steps with each stock solver; the student with 4, 1, 2
and 8 steps without guidance. Every row has its accuracy, the paired difference to the teacher with its interval, and
its FID less the floor (what renders of the same captions get) over the teacher's. With `--lora FILE` both draw again
with that LoRA, which the student never saw, and are compared with one another; their FID would tell of the style.
`--unseen CONFIG` leaves out the captions that stand word for word among those that a training by that config drew on
this kind of device (`overlap.py`), and says how many they were. Each row is told and written as soon as it is there;
`--preset exact` draws quicker than stock diffusers, and `--solvers` with no name leaves the four-step teachers out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from overlap import CACHED, Overlap, trained

import vivace
from vivace.builtin.reader import FEATURES, Reader, load_reader
from vivace.config import PRESETS
from vivace.distill import read_config
from vivace.evals.accuracy import Accuracy, compare
from vivace.evals.builtin import Answers, Exam, draw_exam, rendered, take
from vivace.evals.fid import Moments, fid
from vivace.few_step import use_few_step
from vivace.load import find, load_source, resolve_device
from vivace.machine import machine
from vivace.scheduler import use_scheduler

SOLVERS = ("euler", "heun", "dpmsolvermultistep", "unipc")


@dataclass(frozen=True)
class Row:
    """One way to draw the exam."""

    name: str
    steps: int
    evaluations: int  # of the denoiser, for a picture
    answers: Answers

    @property
    def right(self) -> list[bool]:
        return [verdict["right"] for verdict in self.answers.verdicts]


def teacher_rows(asked: argparse.Namespace, exam: Exam, reader: Reader, *, lora: Path | None = None) -> Iterator[Row]:
    """The teacher as it is meant to be used, and in four steps with each stock solver; all with its guidance.

    With a LoRA only as it is meant to be used.
    """
    source = find(asked.model)
    settings = {"steps": 28, "guidance": 3.5, **source.defaults}
    for solver in (None, *asked.solvers) if lora is None else (None,):
        steps = 4 if solver else settings["steps"]
        pipe = load_source(source, device=asked.device)
        if solver:
            use_scheduler(pipe, solver, prediction=source.prediction)
        pipe = adapted(pipe, lora, preset=asked.preset)
        answers = take(exam, pipe, reader, steps=steps, guidance_scale=settings["guidance"])
        twice = 2 * (2 if solver == "heun" else 1)
        evaluations = twice * steps - (2 if solver == "heun" else 0)
        yield Row(named(f"teacher, {solver}" if solver else "teacher", lora), steps, evaluations, answers)


def student_rows(asked: argparse.Namespace, exam: Exam, reader: Reader, *, lora: Path | None = None) -> Iterator[Row]:
    """Every student with each number of steps, without guidance."""
    for folder in asked.results:
        pipe = use_few_step(load_source(find(asked.model), device=asked.device), folder)
        pipe = adapted(pipe, lora, preset=asked.preset)
        # A training writes to OUTPUT/result: what tells one from another is the folder above.
        name = named(f"student, {folder.resolve().parent.name if folder.name == 'result' else folder.name}", lora)
        for count in asked.steps:
            yield Row(name, count, count, take(exam, pipe, reader, steps=count, guidance_scale=1.0))


def adapted(pipe: Any, lora: Path | None, *, preset: str | None) -> Any:
    """The pipeline, silent, with that LoRA, accelerated by that preset."""
    pipe.set_progress_bar_config(disable=True)
    if preset:
        vivace.accelerate(pipe, preset)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipe


def named(row: str, lora: Path | None) -> str:
    """A row's name."""
    return f"{row} + {lora.stem}" if lora else row


def line(facts: dict[str, Any]) -> str:
    """A row as text."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
    )


def figures(row: Row, teacher: Row, *, fids: tuple[float, Moments] | None) -> dict[str, Any]:
    """A row as plain values; `fids` are the floor and what it is measured from, None where no FID is wanted."""
    accuracy, paired = Accuracy.of(row.right), compare(row.right, teacher.right)
    found: dict[str, Any] = {
        "name": row.name,
        "steps": row.steps,
        "evaluations": row.evaluations,
        "accuracy": accuracy.share,
        "accuracy interval": list(accuracy.interval),
        "points from the teacher": 100 * paired.difference,
        "their interval": [100 * end for end in paired.interval],
        "seconds a picture": row.answers.seconds / len(row.right),
    }
    if fids is not None:
        floor, real = fids
        distance, teachers = (fid(Moments.of(one.answers.features), real) for one in (row, teacher))
        found["FID"] = distance
        found["FID less the floor, of the teacher's"] = (distance - floor) / (teachers - floor)
    return found


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results of vivace distill")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 1, 2, 8])
    parser.add_argument("--solvers", nargs="*", default=SOLVERS, choices=SOLVERS, help="of the teacher in four steps")
    parser.add_argument("--preset", choices=PRESETS, help="accelerate by this preset; else stock diffusers")
    parser.add_argument("--lora", type=Path, help="a .safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unseen", metavar="CONFIG", help="leave out the captions of this config's training")
    parser.add_argument("--batches", type=int, default=CACHED, help="with --unseen: how many batches it drew")
    parser.add_argument("--device")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args(arguments)


def examination(asked: argparse.Namespace, *, device: str) -> tuple[Exam, dict[str, Any]]:
    """The exam as asked for, and what the JSON says of it."""
    exam = draw_exam(asked.captions, seed=asked.seed)
    about: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "captions": asked.captions, "seed": asked.seed}
    if asked.unseen is None:
        return exam, about
    found = Overlap.of(exam, trained(read_config(asked.unseen), batches=asked.batches, device=device))
    return found.rest(), {**about, "left out": found.to_dict()}


def floor_of(exam: Exam, reader: Reader, *, seed: int, count: int) -> tuple[float, Moments] | None:
    """What renders of the exam's captions get beside those of `count` others, and these; None for too few captions."""
    if len(exam.captions) <= FEATURES:
        return None
    real = Moments.of(rendered(draw_exam(count, seed=seed), reader))
    return fid(Moments.of(rendered(exam, reader)), real), real


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parsed(arguments)
    device = resolve_device(asked.device)
    reader = load_reader(device=device)
    exam, about = examination(asked, device=device.type)
    if "left out" in about:
        print("left out:", json.dumps(about["left out"]["exam"]), flush=True)
    about |= {"machine": machine(), "rows": []}
    fids = floor_of(exam, reader, seed=asked.seed + 1, count=asked.captions)
    if fids is not None:
        about["FID floor"] = fids[0]
        print(f"floor of FID {fids[0]:.4g}", flush=True)

    def keep(facts: dict[str, Any]) -> None:
        about["rows"].append(facts)
        print(line(facts), flush=True)
        if asked.output:
            asked.output.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    for lora in (None, asked.lora) if asked.lora else (None,):
        teacher = None
        for row in chain(*(rows(asked, exam, reader, lora=lora) for rows in (teacher_rows, student_rows))):
            teacher = teacher or row
            keep(figures(row, teacher, fids=None if lora else fids))


if __name__ == "__main__":
    main()
