"""Speed against quality as a picture: one drawing, as SVG for a page and as PNG for a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 880, 460  # units
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 46, 56
SCALE = 2  # pixels of the PNG a unit
INK, FAINT, GRID = "#212529", "#868e96", "#e9ecef"
COLOURS = {"candidate": "#d9480f", "control": "#868e96", "reference": "#212529", "floor": "#1971c2"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One contestant."""

    name: str
    role: str
    x: float
    y: float


class Canvas:
    """Lines, dots and words, drawn twice: as SVG elements and into a picture."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], *, colour: str, width: float = 1) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        self._draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=round(width * SCALE))

    def dot(self, at: tuple[float, float], *, colour: str, radius: float = 5) -> None:
        x, y = at
        self.elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')
        box = [(c + d) * SCALE for d in (-radius, radius) for c in at]
        self._draw.ellipse(box, fill=colour)

    def text(
        self, at: tuple[float, float], words: str, *, size: int = 12, colour: str = INK, anchor: str = "start"
    ) -> None:
        x, y = at
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
        self.elements.append(f'<text {place} fill="{colour}">{escape(words)}</text>')
        font = ImageFont.load_default(size * SCALE)
        corner = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        self._draw.text((x * SCALE, y * SCALE), words, font=font, fill=colour, anchor=corner)

    @property
    def svg(self) -> str:
        inside = "\n".join(self.elements)
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" '
            f'font-family="system-ui, sans-serif">\n{inside}\n</svg>'
        )


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x: str,
    y: str,
    front: Sequence[str] = (),
    line: tuple[str, float] | None = None,
) -> Canvas:
    """Points with their names, and a line through those named in `front`; `line` is a level with its name."""
    canvas = Canvas()
    values = [point.y for point in points] + ([line[1]] if line else [])
    xs, ys = _range([0.0, *(point.x for point in points)]), _range(values)

    def at(px: float, py: float) -> tuple[float, float]:
        across = (px - xs[0]) / (xs[-1] - xs[0])
        up = (py - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for tick in xs:
        canvas.line([at(tick, ys[0]), at(tick, ys[-1])], colour=GRID)
        canvas.text((at(tick, ys[0])[0], HEIGHT - BOTTOM + 18), f"{tick:g}", colour=FAINT, anchor="middle")
    for tick in ys:
        canvas.line([at(xs[0], tick), at(xs[-1], tick)], colour=GRID)
        canvas.text((LEFT - 8, at(xs[0], tick)[1] + 4), f"{tick:g}", colour=FAINT, anchor="end")
    canvas.text((LEFT, 26), title, size=15)
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), x, colour=FAINT, anchor="middle")
    canvas.text((LEFT, TOP - 6), y, colour=FAINT)
    if line:
        canvas.line([at(xs[0], line[1]), at(xs[-1], line[1])], colour=COLOURS["floor"])
        canvas.text((WIDTH - RIGHT, at(0, line[1])[1] - 5), line[0], size=11, colour=COLOURS["floor"], anchor="end")
    chosen = sorted((point for point in points if point.name in front), key=lambda point: point.x)
    if len(chosen) > 1:
        canvas.line([at(point.x, point.y) for point in chosen], colour=COLOURS["candidate"], width=1.5)
    _points(canvas, [(point, at(point.x, point.y)) for point in points])
    return canvas


def save(canvas: Canvas, path: Path) -> None:
    """The PNG."""
    canvas.image.save(path, optimize=True)


def _points(canvas: Canvas, placed: Sequence[tuple[Point, tuple[float, float]]]) -> None:
    """Dots, and names that step down where they would lie on one another."""
    taken: list[tuple[float, float]] = []
    for point, (px, py) in sorted(placed, key=lambda pair: pair[1][1]):
        colour = COLOURS.get(point.role, INK)
        canvas.dot((px, py), colour=colour)
        left = px > WIDTH * 0.7
        ty = py + 4
        while any(abs(ty - other) < 13 and abs(px - where) < 200 for where, other in taken):
            ty += 13
        taken.append((px, ty))
        canvas.text(
            (px - 9 if left else px + 9, ty), point.name, size=11, colour=colour, anchor="end" if left else "start"
        )


def _range(values: Sequence[float]) -> list[float]:
    """Round ticks from below the smallest to above the largest value."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    rough = (high - low) / 5
    unit = 10 ** floor(log10(rough))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = floor(low / step), -floor(-high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]
