"""A bench as a bar chart: one panel a workload, one bar a contestant, shorter is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vivace.bench.table import Line, duration, rows
from vivace.generation.picture import whole

SCALE = 2  # pixels a unit, for sharp text
WIDTH, MARGIN, LABEL, ROW, HEADER = 960, 24, 190, 30, 56  # LABEL: the least that names get
OURS, PEER, INK, FAINT, PAPER = "#d9480f", "#868e96", "#212529", "#868e96", "#ffffff"


def draw(groups: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Writes a PNG of every workload's medians; who has no time is named with the reason."""
    panels = [
        (title, rows(lines), {one["contestant"] for one in lines if one["ours"]}) for title, lines in groups.items()
    ]
    height = MARGIN + sum(HEADER + ROW * len(found) + MARGIN for _, found, _ in panels)
    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
    top = MARGIN
    for title, found, ours in panels:
        top = _panel(ImageDraw.Draw(image), title, found, ours, top)
    save(image, path)


def _panel(canvas: ImageDraw.ImageDraw, title: str, found: list[dict[str, Any]], ours: set[str], top: int) -> int:
    """Draws one workload from `top` down; returns where the next one starts."""
    text(canvas, (MARGIN, top), title, size=15, fill=INK)
    text(canvas, (MARGIN, top + 22), "median; shorter is faster", size=11, fill=FAINT)
    top += HEADER
    longest = max((row["ms"] for row in found if row["ms"]), default=1.0)
    widest = max(ImageFont.load_default(13 * SCALE).getlength(row["contestant"]) / SCALE for row in found)
    left = max(LABEL, MARGIN + widest + 10)
    full = WIDTH - left - MARGIN - 190  # what the figures beside the bars need
    for row in found:
        middle = top + ROW // 2
        mine = row["contestant"] in ours
        text(canvas, (left - 10, middle), row["contestant"], size=13, fill=INK, anchor="rm")
        if row["ms"]:
            end = left + max(2, full * row["ms"] / longest)
            box = [edge * SCALE for edge in (left, top + 5, end, top + ROW - 5)]
            canvas.rounded_rectangle(box, radius=3 * SCALE, fill=OURS if mine else PEER)
            cold = "" if row["cold s"] is None else f"   cold {row['cold s']:.1f} s"
            text(canvas, (end + 8, middle), f"{duration(row['ms'])}{cold}", size=12, fill=INK, anchor="lm")
        else:
            text(canvas, (left, middle), str(row["how"])[:96], size=12, fill=FAINT, anchor="lm")
        top += ROW
    return top + MARGIN


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG of a few flat colours and their edges, half the bytes; whole, or the earlier one stays."""
    with whole(path) as part:
        image.quantize(256, dither=Image.Dither.NONE).save(part, optimize=True)


def text(
    canvas: ImageDraw.ImageDraw, at: tuple[float, float], words: str, *, size: int, fill: str, anchor: str = "la"
) -> None:
    """Draws `words`; sizes and places in units of the chart."""
    font = ImageFont.load_default(size * SCALE)
    canvas.text((at[0] * SCALE, at[1] * SCALE), words, font=font, fill=fill, anchor=anchor)
