"""Where a few-step student of the built-in model loses: its first steps are its own, the rest its teacher's.

    python recipes/distill/relay.py runs/builtin/result -o benchmarks/<date>-<machine>-distill-relay.json

After the student's first k steps the teacher takes over from the noise level it has come to, with guidance and a finer
grid, and the reader counts what is drawn right: a step that costs accuracy is one whose relay does worse than the one
before. With k = 0 the teacher draws alone, with k = 4 the student.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from vivace.accelerate import accelerate
from vivace.builtin.judge import judge
from vivace.builtin.reader import Reader, load_reader, read
from vivace.evals.accuracy import Accuracy, compare
from vivace.evals.builtin import BATCH, Exam, draw_exam
from vivace.few_step import facts, use_few_step
from vivace.load import find, load_source
from vivace.machine import machine


def relay(
    student: Any, teacher: Any, captions: list[str], noise: torch.Tensor, *, own: int, steps: int, **rest: Any
) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [0, 1] by `own` of the student's `steps` and then the teacher, called with `rest`."""
    path = [1 - step / steps for step in range(steps)]
    left, x = 1.0, noise
    if own:
        kind = "pt" if own == steps else "latent"
        call = {"sigmas": path[:own], "num_inference_steps": own, "guidance_scale": 1.0, "output_type": kind}
        x = student(captions, latents=x, **call).images
        if own == steps:
            return x
        left, shift = path[own], teacher.scheduler.config.shift
        level = shift * left / (1 + (shift - 1) * left)
        again = torch.randn(noise.shape, generator=torch.Generator().manual_seed(own)).to(x)
        x = (1 - level) * x + level * again
    count = round(left * rest.pop("num_inference_steps"))
    sigmas = [left * (1 - step / count) for step in range(count)]
    return teacher(captions, latents=x, sigmas=sigmas, num_inference_steps=count, output_type="pt", **rest).images


def verdicts(
    student: Any, teacher: Any, exam: Exam, reader: Reader, *, own: int, steps: int, **rest: Any
) -> list[bool]:
    """Whether each caption of the exam is drawn right by such a relay; caption i begins with the noise of seed i."""
    transformer, right = teacher.transformer, []
    shape = (transformer.config.in_channels, *(transformer.config.sample_size,) * 2)
    for first in range(0, len(exam.captions), BATCH):
        captions, said = list(exam.captions[first : first + BATCH]), exam.said[first : first + BATCH]
        seeds = range(first, first + len(captions))
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        noise = noise.to(teacher.device, transformer.dtype)
        pictures = relay(student, teacher, captions, noise, own=own, steps=steps, **rest)
        right += [verdict["right"] for verdict in map(judge, read(reader, pictures.float()), said)]
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a result of vivace distill")
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--teacher-steps", type=int, default=28)
    parser.add_argument("--device")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()

    source, steps = find("builtin"), facts(asked.result)["steps"]
    exam = draw_exam(asked.captions, seed=0)
    teacher: Any = load_source(source, device=asked.device)
    student: Any = use_few_step(load_source(source, device=asked.device), asked.result)
    reader = load_reader(device=teacher.device)
    for pipe in (teacher, student):
        pipe.set_progress_bar_config(disable=True)
        accelerate(pipe, "exact")
    rest = {"num_inference_steps": asked.teacher_steps, "guidance_scale": source.defaults["guidance"]}
    rows, alone = [], []
    for own in range(steps + 1):
        right = verdicts(student, teacher, exam, reader, own=own, steps=steps, **rest)
        alone = alone or right
        found, paired = Accuracy.of(right), compare(right, alone)
        rows.append(
            {
                "student's steps": own,
                "accuracy": found.share,
                "accuracy interval": list(found.interval),
                "points from the teacher": 100 * paired.difference,
                "their interval": [100 * end for end in paired.interval],
            }
        )
        print(f"{own} of {steps} steps by the student: {100 * found.share:.1f} % right", flush=True)
    if asked.output:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "captions": asked.captions,
            "teacher's steps": asked.teacher_steps,
            "machine": machine(),
        }
        asked.output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
