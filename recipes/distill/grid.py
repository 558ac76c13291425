"""Draw docs/few-step.png: what a few-step student of the built-in model draws, between two rows of its teacher.

python recipes/distill/grid.py src/vivace/builtin/model/few_step
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from vivace.accelerate import accelerate
from vivace.evals.builtin import draw_exam
from vivace.evals.sample import sample
from vivace.few_step import use_few_step
from vivace.load import find, load_source
from vivace.scheduler import use_scheduler

SIDE, STRIP = 160, 22  # pixels of a picture, and of the words above a row
SOLVER = "dpmsolvermultistep"  # stock's best in four steps


def rows(student: Path, captions: tuple[str, ...], *, device: str | None) -> dict[str, torch.Tensor]:
    """Pictures [N, 3, H, W] in [0, 1] of every row, by what is written above it; caption i has seed i."""
    source = find("builtin")
    defaults = source.defaults
    found = {}
    for steps in (defaults["steps"], 4):
        pipe: Any = load_source(source, device=device)
        solver = "" if steps == defaults["steps"] else f" of {SOLVER}"
        if solver:
            use_scheduler(pipe, SOLVER, prediction=source.prediction)
        name = f"teacher, {steps} steps{solver}, {2 * steps} evaluations"
        found[name] = _drawn(pipe, captions, steps=steps, guidance_scale=defaults["guidance"])
    pipe = use_few_step(load_source(source, device=device), student)
    for steps in (8, 4, 2, 1):
        name = f"student, {steps} step{'s' * (steps > 1)}, {steps} evaluation{'s' * (steps > 1)}"
        found[name] = _drawn(pipe, captions, steps=steps, guidance_scale=1.0)
    return found


def _drawn(pipe: Any, captions: tuple[str, ...], **call: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return sample(accelerate(pipe, "exact"), captions, seed=0, batch=len(captions), **call).pictures


def sheet(pictures: dict[str, torch.Tensor]) -> Image.Image:
    """The rows under one another, each under its name."""
    columns = max(map(len, pictures.values()))
    found = Image.new("RGB", (columns * SIDE, len(pictures) * (SIDE + STRIP)), "white")
    pen, font = ImageDraw.Draw(found), ImageFont.load_default(13)
    assert isinstance(font, FreeTypeFont)
    for row, (name, drawn) in enumerate(pictures.items()):
        top = row * (SIDE + STRIP)
        pen.text((4, top + 3), name, fill="black", font=font)
        for column, picture in enumerate(drawn):
            tile = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
            found.paste(tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * SIDE, top + STRIP))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="a result of vivace distill")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--device")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/few-step.png"))
    asked = parser.parse_args()
    captions = draw_exam(asked.pictures, seed=0).captions
    sheet(rows(asked.student, captions, device=asked.device)).save(asked.output, optimize=True)
    print(*captions, sep="\n")


if __name__ == "__main__":
    main()
