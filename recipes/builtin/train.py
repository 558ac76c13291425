"""Train the built-in model, stage by stage.

    python recipes/builtin/train.py STAGE [STAGE ...] --state DIR --out DIR

A stage is NAME=SECONDS (as many steps as fit) or NAME=STEPSs (exactly so many): reader, autoencoder, reader2,
transformer. `transformer:0-0.5=540` runs the first half of its schedule, a later `transformer:0.5-1=540` the rest.
`--state` keeps what the next stage needs; `--out` receives averaged 16-bit weights and the training curves.
A stage that misses its gate ends the run with exit code 1.
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

import train_autoencoder
import train_reader
import train_transformer
from course import Course
from diffusers import AutoencoderTiny

from vivace import builtin
from vivace.builtin.reader import WEIGHTS, load_reader

PEAKS = {"reader": 2e-3, "autoencoder": 1.2e-3, "reader2": 1e-3, "transformer": 1e-3}
GATES = {"reader": ("renders", 0.95), "reader2": ("reconstructions", 0.99)}


def course_of(text: str) -> tuple[str, Course]:
    """ "transformer:0-0.5=540" to the stage's name and its course."""
    stage, _, length = text.partition("=")
    name, _, span = stage.partition(":")
    first, last = (float(part) for part in span.split("-")) if span else (0.0, 1.0)
    fixed = {"steps": int(length[:-1])} if length.endswith("s") else {"seconds": float(length)}
    return name, Course(name=name, peak=PEAKS[name], first=first, last=last, **fixed)


def begin(state: Path) -> None:
    """Where no earlier stage left a reader or an autoencoder, start from the shipped ones."""
    state.mkdir(parents=True, exist_ok=True)
    shipped = Path(builtin.__file__).parent
    if not (state / "reader.pt").exists() and WEIGHTS.exists():
        torch.save(load_reader().state_dict(), state / "reader.pt")
    if not (state / "vae").exists() and (shipped / "model" / "vae").exists():
        shutil.copytree(shipped / "model" / "vae", state / "vae")


def run(name: str, course: Course, options: argparse.Namespace) -> None:
    """One stage."""
    state, out, device = options.state, options.out, options.device
    if name == "autoencoder":
        train_autoencoder.train(course, state, out, device, batch=options.small or 96)
    elif name == "transformer":
        train_transformer.train(
            course,
            state,
            out,
            device,
            scenes=options.scenes,
            batch=options.small or options.batch,
            workers=min(os.cpu_count() or 1, 14),
            resume=options.resume,
            quizzes=options.quizzes,
        )
    else:
        vae = None
        if name == "reader2":
            vae = AutoencoderTiny.from_pretrained(state / "vae").to(device, memory_format=torch.channels_last)
        train_reader.train(course, state, out, device, vae=vae, batch=options.small or 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=384 * 1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--small", type=int, default=0, help="batch of every stage, to try the recipe on a CPU")
    parser.add_argument("--quizzes", type=int, default=6)
    parser.add_argument("--resume", type=Path, help="folder of exported weights to go on from")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    begin(options.state)
    for text in options.stages:
        name, course = course_of(text)
        run(name, course, options)
        part, least = GATES.get(name, ("", 0.0))
        reached = course.curve[-1].get(part, 1.0)
        if reached < least and not options.small:
            sys.exit(f"{name} missed its gate: {part} {reached} < {least}; {json.dumps(course.curve[-1])}")


if __name__ == "__main__":
    main()
