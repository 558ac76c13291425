"""Make the built-in model: data, reader, autoencoder, text encoders, transformer, evaluation, curves and grid.

    python recipes/builtin/train.py --state STATE --out OUT [STAGE ...]

Every stage has a gate (gates.py): one that misses it ends the run with exit code 1. What has passed is kept in
OUT/stages.json, so that the same command, run again, goes on; stages that are named run whatever was kept. A stage
takes the steps that the shipped model was trained with; NAME=STEPS takes another number. `--state` keeps what the next
stage needs; `--out` receives averaged 16-bit weights, and with the last stages the model, its figures and pictures.
To ship it: cp -r OUT/model OUT/reader.safetensors src/vivace/builtin/, and OUT/*.png OUT/grid.json to docs/.
`--tiny` runs all of it with a few pictures and steps on a CPU, to try the recipe: its gates measure and let pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import curves
import evaluate
import grid
import publish
import train_autoencoder
import train_reader
import train_transformer
from course import Course
from diffusers import AutoencoderTiny
from extent import FULL, TINY, Run
from gates import missed

from vivace.builtin.reader import load_reader

STEPS = {
    "reader": 2346, "autoencoder": 6442, "reader2": 2397, "transformer:0-0.46": 10130, "transformer:0.46-1": 7287,
}  # fmt: skip
PEAKS = {"reader": 2e-3, "autoencoder": 1.2e-3, "reader2": 1e-3, "transformer": 1e-3}
NEEDS = {
    "autoencoder": ("reader.pt",), "reader2": ("reader.pt", "vae"), "transformer": ("reader.pt", "vae"),
}  # fmt: skip
ENDINGS = {
    "publish": lambda run: publish.publish(run.out, to=run.out, device=run.device, extent=run.extent),
    "evaluate": lambda run: evaluate.evaluate(run.out, device=run.device, extent=run.extent),
    "curves": lambda run: curves.plot(run.out / "curves.json", to=run.out / "training.png"),
    "grid": lambda run: grid.draw(run.out, to=run.out, device=run.device, side=run.extent.grid),
}  # what comes after training: each gives its figures, or nothing
STAGES = (*STEPS, *ENDINGS)
LEFT = {
    "publish": ("reader.safetensors", "vae", *train_transformer.PARTS),
    "evaluate": ("model", "reader.safetensors"),
    "curves": ("curves.json",),
    "grid": ("model", "reader.safetensors"),
}  # what each of these takes of what the stages before it have left in OUT


def course_of(stage: str, *, steps: int) -> Course:
    """The course of "transformer:0-0.46" or of a stage without a span."""
    name, _, span = stage.partition(":")
    first, last = (float(part) for part in span.split("-")) if span else (0.0, 1.0)
    return Course(name=name, peak=PEAKS[name], steps=steps, first=first, last=last)


def take_up(run: Run) -> None:
    """Begin with what another run exported, where this one has nothing of its own."""
    if run.resume is None:
        return
    for name in ("reader.safetensors", "vae", *train_transformer.PARTS):
        source, target = run.resume / name, run.out / name
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target)
        elif source.is_file() and not target.exists():
            shutil.copy(source, target)
    if (run.out / "reader.safetensors").exists() and not (run.state / "reader.pt").exists():
        torch.save(load_reader(run.out / "reader.safetensors").state_dict(), run.state / "reader.pt")
    if (run.out / "vae").exists() and not (run.state / "vae").exists():
        AutoencoderTiny.from_pretrained(run.out / "vae").save_pretrained(run.state / "vae")


def train(course: Course, run: Run) -> None:
    """One stage of training."""
    absent = [name for name in NEEDS.get(course.name, ()) if not (run.state / name).exists()]
    if course.first > 0 and run.resume is None and not (run.state / "student.pt").exists():
        absent.append("student.pt")
    if absent:
        sys.exit(f"{course.name} needs {', '.join(absent)} in {run.state}: run the stages before it, or give --resume")
    if course.name == "autoencoder":
        train_autoencoder.train(course, run)
    elif course.name == "transformer":
        train_transformer.train(course, run, workers=min(os.cpu_count() or 1, 14, -(-run.extent.scenes // 5000)))
    else:
        vae = None
        if course.name == "reader2":
            vae = AutoencoderTiny.from_pretrained(run.state / "vae").to(run.device, memory_format=torch.channels_last)
        train_reader.train(course, run, vae=vae)


def pass_through(text: str, run: Run) -> list[str]:
    """Run one stage, NAME or NAME=STEPS, and keep its figures; what it missed, a line each."""
    stage, _, length = text.partition("=")
    if stage in ENDINGS:
        absent = [name for name in LEFT[stage] if not (run.out / name).exists()]
        if absent:
            sys.exit(f"{stage} needs {', '.join(absent)} in {run.out}: run the stages before it, or give --resume")
        figures = ENDINGS[stage](run) or {}
    else:
        course = course_of(stage, steps=int(length) if length else 2 if run.extent is TINY else STEPS[stage])
        train(course, run)
        figures = course.figures()
    lines = missed(stage, figures)
    if not lines or run.extent is TINY:
        kept = passed(run) | {stage: figures}
        (run.out / "stages.json").write_text(json.dumps(kept, indent=1) + "\n")
    return lines


def passed(run: Run) -> dict[str, dict[str, float]]:
    """The stages that have passed their gates, with what each one reached."""
    path = run.out / "stages.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all that have not passed")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", type=Path, help="another run's OUT, whose averaged weights to go on from")
    parser.add_argument("--tiny", action="store_true", help="a few pictures and steps of everything")
    given = parser.parse_args()
    unknown = [text for text in given.stages if text.partition("=")[0] not in STAGES]
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    for stage, equals, steps in (text.partition("=") for text in given.stages):
        if equals and (stage in ENDINGS or not steps.isdecimal() or int(steps) < 1):
            parser.error(f"{stage}={steps}: a stage of training takes a number of steps from 1 on, the others none")
    if given.resume and not given.resume.is_dir():
        parser.error(f"no folder {given.resume} to resume from")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for folder in (given.state, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    extent = TINY if given.tiny else FULL
    run = Run(state=given.state, out=given.out, device=given.device, extent=extent, resume=given.resume)
    take_up(run)
    for text in given.stages or [stage for stage in STAGES if stage not in passed(run)]:
        lines = pass_through(text, run)
        if lines:
            print(f"{text} missed its gate: {'; '.join(lines)}", file=sys.stderr, flush=True)
            if not given.tiny:
                sys.exit(1)


if __name__ == "__main__":
    main()
