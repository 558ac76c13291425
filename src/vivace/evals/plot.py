"""Speed against quality as a picture: one drawing, as SVG for a page and as PNG for a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1080, 460  # units; higher where the names need it
LINE = 19  # units from name to name
LETTERS = 50  # of a name at most
LEFT, RIGHT, TOP, BOTTOM = 70, 350, 56, 56  # the names stand on the right
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

    def __init__(self, *, height: int = HEIGHT) -> None:
        self.height = height
        self.elements: list[str] = []
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
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
            f'<svg viewBox="0 0 {WIDTH} {self.height}" xmlns="http://www.w3.org/2000/svg" '
            f'font-family="system-ui, sans-serif">\n{inside}\n</svg>'
        )


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x: str,
    y: str,
    front: Sequence[str] = (),
    level: tuple[str, float] | None = None,
) -> Canvas:
    """Numbered points with their names beside, and a line through those named in `front`.

    `level` is a name and a height: drawn where it lies among the points, else only said.
    """
    height = max(HEIGHT, TOP + BOTTOM + LINE * len(points))
    canvas = Canvas(height=height)
    xs, ys = _range([1.0, *(point.x for point in points)]), _range([point.y for point in points])

    def at(px: float, py: float) -> tuple[float, float]:
        across = (px - xs[0]) / (xs[-1] - xs[0])
        up = (py - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    for tick in xs:
        canvas.line([at(tick, ys[0]), at(tick, ys[-1])], colour=GRID)
        canvas.text((at(tick, ys[0])[0], height - BOTTOM + 18), f"{tick:g}", colour=FAINT, anchor="middle")
    for tick in ys:
        canvas.line([at(xs[0], tick), at(xs[-1], tick)], colour=GRID)
        canvas.text((LEFT - 8, at(xs[0], tick)[1] + 4), f"{tick:g}", colour=FAINT, anchor="end")
    canvas.text((LEFT, 24), title, size=15)
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, height - 14), x, colour=FAINT, anchor="middle")
    canvas.text((LEFT - 8, TOP - 10), y, colour=FAINT, anchor="end")
    if level:
        _level(canvas, level, inside=ys[0] <= level[1] <= ys[-1], height=at(xs[0], level[1])[1])
    chosen = sorted((point for point in points if point.name in front), key=lambda point: point.x)
    if len(chosen) > 1:
        canvas.line([at(point.x, point.y) for point in chosen], colour=COLOURS["candidate"], width=1.5)
    for number, point in enumerate(sorted(points, key=lambda point: -point.x), start=1):
        colour = COLOURS.get(point.role, INK)
        canvas.dot(at(point.x, point.y), colour=colour, radius=9)
        px, py = at(point.x, point.y)
        canvas.text((px, py + 4), str(number), size=11, colour="#ffffff", anchor="middle")
        canvas.text((WIDTH - RIGHT + 24, TOP + LINE * number), f"{number}  {_short(point.name)}", colour=colour)
    return canvas


def save(canvas: Canvas, path: Path) -> None:
    """The PNG."""
    canvas.image.save(path, optimize=True)


def _level(canvas: Canvas, level: tuple[str, float], *, inside: bool, height: float) -> None:
    name, value = level
    said = f"{name} {value:.1f}"
    if inside:
        canvas.line([(LEFT, height), (WIDTH - RIGHT, height)], colour=COLOURS["floor"])
    place = height - 6 if inside else TOP - 10
    canvas.text(
        (WIDTH - RIGHT, place), said if inside else f"{said}, out of sight", colour=COLOURS["floor"], anchor="end"
    )


def _short(name: str) -> str:
    """A name as far as there is room on the right."""
    return name if len(name) <= LETTERS else f"{name[: LETTERS // 2]}…{name[-LETTERS // 2 :]}"


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
