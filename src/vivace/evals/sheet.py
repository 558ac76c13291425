"""A contact sheet: one row a prompt, one column a contestant, one picture to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, HEAD, MARGIN = 192, 8, 46, 200  # pixels
ROWS = 24
"""Prompts on a sheet; the first ones."""


def sheet(rows: Sequence[tuple[str, Sequence[Path]]], *, columns: Sequence[str], cell: int = CELL) -> Image.Image:
    """Every row's prompt on the left, its pictures under the columns' names."""
    rows = rows[:ROWS]
    size = (MARGIN + (cell + GAP) * len(columns), HEAD + (cell + GAP) * len(rows))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for place, name in enumerate(columns):
        x = MARGIN + place * (cell + GAP)
        draw.multiline_text((x, 6), "\n".join(wrap(name, cell // 7)[:2]), fill="#212529", font=font)
    for place, (prompt, pictures) in enumerate(rows):
        y = HEAD + place * (cell + GAP)
        draw.multiline_text((8, y + 4), "\n".join(wrap(prompt, 26)[:10]), fill="#495057", font=font)
        for column, path in enumerate(pictures):
            page.paste(fitted(path, cell), (MARGIN + column * (cell + GAP), y))
    return page


def fitted(path: Path, cell: int) -> Image.Image:
    """A picture in a square cell, its sides in proportion; small ones are enlarged without smoothing."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    scale = cell / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)  # pyright: ignore
    page = Image.new("RGB", (cell, cell), "white")
    page.paste(picture, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return page
