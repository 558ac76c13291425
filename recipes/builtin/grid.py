"""Draw the pictures of docs/grid.png, and list what was asked and what the reader says of each.

    python recipes/builtin/grid.py

`grid.json` keeps the verdicts by eye ("eye") that are there already, as long as weights, caption and seed are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

import vivace
from vivace import builtin
from vivace.builtin.judge import judge
from vivace.builtin.reader import load_reader, read
from vivace.evals.builtin import draw_exam
from vivace.evals.sample import sample
from vivace.few_step import FOLDER
from vivace.load import find

SIDE = 160  # pixels of a picture in the grid
SEED = 64


def draw(folder: Path, *, to: Path, device: str | None = None, side: int = 8) -> None:
    """Write grid.png, of side x side pictures, and grid.json, of the model and the reader in `folder`."""
    pipe: Any = vivace.accelerate(vivace.load(folder / "model", device=device))
    pipe.set_progress_bar_config(disable=True)
    defaults = find(folder / "model").defaults
    exam = draw_exam(side * side, seed=SEED)
    call = {"steps": defaults["steps"], "guidance_scale": defaults["guidance"]}
    pictures = sample(pipe, exam.captions, seed=SEED, batch=side, **call).pictures
    readings = read(load_reader(folder / "reader.safetensors"), pictures)
    to.mkdir(exist_ok=True)
    # To four levels of 255, which nobody sees and which halves the file.
    whole = sheet(pictures, side=side).point(lambda level: min(255, (level + 2) // 4 * 4))
    whole.save(to / "grid.png", optimize=True)
    rows = [
        {"seed": SEED + place, "caption": caption, "reader": judge(reading, said)["right"]}
        for place, (caption, reading, said) in enumerate(zip(exam.captions, readings, exam.said, strict=True))
    ]
    write(rows, weights=identity(folder / "model"), path=to / "grid.json")


def sheet(pictures: torch.Tensor, *, side: int) -> Image.Image:
    """Pictures [N, 3, H, W] in [0, 1] row by row, `side` in a row."""
    found = Image.new("RGB", (side * SIDE, side * SIDE))
    for place, picture in enumerate(pictures):
        tile = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
        found.paste(tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (place % side * SIDE, place // side * SIDE))
    return found


def write(rows: list[dict[str, Any]], *, weights: str, path: Path) -> None:
    """One picture a line, with the verdicts by eye that were given to these weights' pictures."""
    known = json.loads(path.read_text()) if path.exists() else {}
    kept = known["pictures"] if known.get("weights") == weights else []
    judged = {(row["seed"], row["caption"]): {"eye": row["eye"]} for row in kept if "eye" in row}
    rows = [row | judged.get((row["seed"], row["caption"]), {}) for row in rows]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{\n "weights": "{weights}",\n "pictures": [\n{lines}\n ]\n}}\n')


def identity(model: Path) -> str:
    """What tells a model's weights from others, in a few letters; its few-step student draws none of the grid.

    Zeros are left out: widening the latents by channels of zeros (as stock inpainting needs) changes no picture.
    """
    digest = hashlib.sha256()
    for component in sorted(path for path in model.iterdir() if path.is_dir() and path.name != FOLDER):
        tensors = {name: t for file in component.glob("*.safetensors") for name, t in load_file(file).items()}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{component.name} {name}\n".encode())
            digest.update(tensor[tensor != 0].numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs"))
    given = parser.parse_args()
    draw(Path(builtin.__file__).parent, to=given.to)


if __name__ == "__main__":
    main()
