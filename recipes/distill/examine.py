"""The few-step student of the built-in model against its teacher, on the same held-out captions and noise.

    python recipes/distill/examine.py runs/builtin/result -o benchmarks/<date>-<gpu>-distill-builtin.json

The teacher draws with its own steps and guidance, and in four steps with each stock solver; the student with 4, 1, 2
and 8 steps without guidance. Every row has its accuracy, the paired difference to the teacher with its interval, and
its FID less the floor (what renders of the same captions get) over the teacher's. With `--lora FILE` both draw again
with that LoRA, which the student never saw, and are compared with one another; their FID would tell of the style.
`--unseen CONFIG` leaves out the captions that stand word for word among those that a training by that config drew on
this kind of device (`overlap.py`), and says how many they were.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlap import CACHED, Overlap, trained

from vivace.builtin.reader import Reader, load_reader
from vivace.distill import read_config
from vivace.evals.accuracy import Accuracy, compare
from vivace.evals.builtin import Answers, Exam, draw_exam, rendered, take
from vivace.evals.fid import Moments, fid
from vivace.few_step import use_few_step
from vivace.load import find, load_source
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


def teacher_rows(model: str, exam: Exam, reader: Reader, *, lora: Path | None = None, device: str | None) -> list[Row]:
    """The teacher as it is meant to be used, and in four steps with each stock solver; all with its guidance.

    With a LoRA only as it is meant to be used.
    """
    source = find(model)
    settings = {"steps": 28, "guidance": 3.5, **source.defaults}
    rows = []
    for solver in (None, *SOLVERS) if lora is None else (None,):
        steps = 4 if solver else settings["steps"]
        pipe = adapted(load_source(source, device=device), lora)
        if solver:
            use_scheduler(pipe, solver, prediction=source.prediction)
        answers = take(exam, pipe, reader, steps=steps, guidance_scale=settings["guidance"])
        twice = 2 * (2 if solver == "heun" else 1)
        evaluations = twice * steps - (2 if solver == "heun" else 0)
        rows.append(Row(named(f"teacher, {solver}" if solver else "teacher", lora), steps, evaluations, answers))
    return rows


def student_rows(
    model: str,
    folder: Path,
    exam: Exam,
    reader: Reader,
    *,
    steps: list[int],
    lora: Path | None = None,
    device: str | None,
) -> list[Row]:
    """The student with each number of steps, without guidance."""
    pipe = adapted(use_few_step(load_source(find(model), device=device), folder), lora)
    # A training writes to OUTPUT/result: what tells one from another is the folder above.
    name = named(f"student, {folder.resolve().parent.name if folder.name == 'result' else folder.name}", lora)
    return [Row(name, count, count, take(exam, pipe, reader, steps=count, guidance_scale=1.0)) for count in steps]


def adapted(pipe: Any, lora: Path | None) -> Any:
    """The pipeline, silent, with that LoRA."""
    pipe.set_progress_bar_config(disable=True)
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


def figures(row: Row, teacher: Row, floor: float, fids: dict[int, float]) -> dict[str, Any]:
    """A row as plain values."""
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
    if id(row) in fids:
        found["FID"] = fids[id(row)]
        found["FID less the floor, of the teacher's"] = (fids[id(row)] - floor) / (fids[id(teacher)] - floor)
    return found


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results of vivace distill")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 1, 2, 8])
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


def main() -> None:
    asked = parsed()
    device = load_source(find(asked.model), device=asked.device).device
    reader = load_reader(device=device)
    exam, about = examination(asked, device=device.type)
    rows = teacher_rows(asked.model, exam, reader, device=asked.device)
    for folder in asked.results:
        rows += student_rows(asked.model, folder, exam, reader, steps=asked.steps, device=asked.device)
    styled = []
    if asked.lora:
        of = {"lora": asked.lora, "device": asked.device}
        styled += teacher_rows(asked.model, exam, reader, **of)
        for folder in asked.results:
            styled += student_rows(asked.model, folder, exam, reader, steps=asked.steps, **of)
    real = Moments.of(rendered(draw_exam(asked.captions, seed=asked.seed + 1), reader))
    floor = fid(Moments.of(rendered(exam, reader)), real)
    fids = {id(row): fid(Moments.of(row.answers.features), real) for row in rows}
    table = [figures(row, first[0], floor, fids) for first in (rows, styled) for row in first]
    print(*map(line, table), f"floor of FID {floor:.4g}", sep="\n")
    if asked.output:
        about |= {"FID floor": floor, "machine": machine(), "rows": table}
        asked.output.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
