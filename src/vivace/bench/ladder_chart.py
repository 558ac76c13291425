"""A ladder as a bar chart: one bar a rung, left to right, and under each what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vivace.bench.chart import FAINT, INK, MARGIN, OURS, PAPER, PEER, SCALE, save, text

BAR, GAP, HEIGHT = 84, 34, 250
"""Width of a bar, the space beside it, and the height of the longest."""
LABEL = 96  # what the names of the rows under the bars need
TOP, NAMES, ROW = 108, 40, 22

UNDER: tuple[tuple[str, str], ...] = (
    ("cold start", "cold s"),
    ("peak memory", "peak GiB"),
    ("error", "error"),
    ("drawn right", "right"),
)
"""The rows under the bars."""


def draw(rows: Sequence[Mapping[str, Any]], *, title: str, where: str, path: Path) -> None:
    """Writes a PNG of the rungs' seconds; a rung without a time says why."""
    under = [(name, key) for name, key in UNDER if any(row[key] is not None for row in rows)]
    width = max(MARGIN + LABEL + len(rows) * (BAR + GAP) + MARGIN, 720)
    height = TOP + HEIGHT + NAMES + ROW * len(under) + MARGIN
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    canvas = ImageDraw.Draw(image)
    text(canvas, (MARGIN, MARGIN), title, size=16, fill=INK)
    text(canvas, (MARGIN, MARGIN + 24), f"{where}; seconds, lower is faster", size=11, fill=FAINT)
    floor = TOP + HEIGHT
    _legend(canvas, width - MARGIN)
    edges = [edge * SCALE for edge in (MARGIN + LABEL, floor, width - MARGIN, floor)]
    canvas.line(edges, fill=INK, width=SCALE)
    longest = max((row["seconds"] for row in rows if row["seconds"]), default=1.0)
    for index, row in enumerate(rows):
        left = MARGIN + LABEL + index * (BAR + GAP) + GAP // 2
        _bar(canvas, row, left=left, floor=floor, share=(row["seconds"] or 0) / longest)
        for line, (_, key) in enumerate(under):
            at = (left + BAR / 2, floor + NAMES + line * ROW)
            text(canvas, at, _cell(key, row[key]), size=12, fill=INK, anchor="ma")
    for line, (name, _) in enumerate(under):
        text(canvas, (MARGIN, floor + NAMES + line * ROW), name, size=12, fill=FAINT)
    save(image, path)


def _legend(canvas: ImageDraw.ImageDraw, right: float) -> None:
    """Which bars are ours."""
    for name, fill in (("vivace", OURS), ("stock, step by step", PEER)):
        text(canvas, (right, MARGIN + 8), name, size=12, fill=INK, anchor="rm")
        right -= canvas.textlength(name, font=ImageFont.load_default(12 * SCALE)) / SCALE + 8
        box = [edge * SCALE for edge in (right - 12, MARGIN + 2, right, MARGIN + 14)]
        canvas.rounded_rectangle(box, radius=2 * SCALE, fill=fill)
        right -= 12 + 20


def _bar(canvas: ImageDraw.ImageDraw, row: Mapping[str, Any], *, left: int, floor: int, share: float) -> None:
    middle, top = left + BAR / 2, floor - HEIGHT * share
    name = row["rung"].removeprefix("vivace ") if row["ours"] else row["rung"]
    fill = OURS if row["ours"] else PEER
    text(canvas, (middle, floor + 8), name, size=13, fill=fill if row["ours"] else INK, anchor="ma")
    if row["seconds"] is None:
        for line, part in enumerate(_wrapped(str(row["how"]), letters=15)[:6]):
            text(canvas, (middle, floor - 90 + 14 * line), part, size=10, fill=FAINT, anchor="ma")
        return
    box = [edge * SCALE for edge in (left, min(top, floor - 2), left + BAR, floor)]
    canvas.rounded_rectangle(box, radius=4 * SCALE, fill=fill, corners=(True, True, False, False))
    text(canvas, (middle, top - 21), f"{row['seconds']:.3f} s", size=14, fill=INK, anchor="mb")
    times = f"{row['x first']:.2f} x" if row["x first"] else ""
    text(canvas, (middle, top - 5), times, size=11, fill=FAINT, anchor="mb")


def _wrapped(words: str, *, letters: int) -> list[str]:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) >= letters and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()[:letters]
    return lines


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    forms = {"cold s": "{:.1f} s", "peak GiB": "{:.2f} GiB", "error": "{:.1e}", "right": "{:.0%}"}
    return forms[key].format(value)
