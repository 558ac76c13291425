"""Draw the pictures of docs/grid.png, and list what was asked and what the reader says of each.

    python recipes/builtin/grid.py

`docs/grid.json` keeps the verdicts by eye ("eye") that are there already, as long as caption and seed stay the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

import vivace
from vivace.builtin.judge import judge
from vivace.builtin.reader import load_reader, read
from vivace.evals.builtin import draw_exam
from vivace.evals.sample import sample
from vivace.load import find

ROWS, COLUMNS, SIDE = 8, 8, 160
SEED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs"))
    options = parser.parse_args()
    pipe = vivace.accelerate(vivace.load("builtin"))
    defaults = find("builtin").defaults
    exam = draw_exam(ROWS * COLUMNS, seed=SEED)
    call = {"steps": defaults["steps"], "guidance_scale": defaults["guidance"]}
    pictures = sample(pipe, exam.captions, seed=SEED, batch=COLUMNS, **call).pictures
    readings = read(load_reader(), pictures)
    sheet = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE))
    for place, picture in enumerate(pictures):
        tile = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
        corner = (place % COLUMNS * SIDE, place // COLUMNS * SIDE)
        sheet.paste(tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS), corner)
    options.to.mkdir(exist_ok=True)
    sheet.save(options.to / "grid.png", optimize=True)
    rows = [
        {"seed": SEED + place, "caption": caption, "reader": judge(reading, said)["right"]}
        for place, (caption, reading, said) in enumerate(zip(exam.captions, readings, exam.said, strict=True))
    ]
    path = options.to / "grid.json"
    known = json.loads(path.read_text())["pictures"] if path.exists() else []
    judged = {(row["seed"], row["caption"]): row["eye"] for row in known if "eye" in row}
    rows = [row | {"eye": judged[key]} if (key := (row["seed"], row["caption"])) in judged else row for row in rows]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text('{\n "pictures": [\n' + lines + "\n ]\n}\n")


if __name__ == "__main__":
    main()
