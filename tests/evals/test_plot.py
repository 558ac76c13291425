"""The plot: every point and name is there, and the two drawings agree on where."""

import re

from vivace.evals.plot import COLOURS, SCALE, Point, scatter


def points():
    return [Point(name=f"cache {i}", role="candidate", x=1 + i / 4, y=50 - i * i) for i in range(5)]


def test_svg_and_png_show_the_same():
    canvas = scatter(points(), title="A <title>", x="x", y="y", front=["cache 0", "cache 4"], level=("floor", 94.5))
    assert canvas.svg.count("<circle") == 5
    assert "A &lt;title&gt;" in canvas.svg
    assert "floor 94.5, out of sight" in canvas.svg
    for name in ("cache 0", "cache 4"):
        assert name in canvas.svg
    colour = tuple(int(COLOURS["candidate"][i : i + 2], 16) for i in (1, 3, 5))
    for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', canvas.svg):
        # Beside the number in the dot's middle.
        assert canvas.image.getpixel((round(float(x) * SCALE) - 13, round(float(y) * SCALE))) == colour


def test_higher_is_higher_and_faster_is_further_right():
    canvas = scatter(points(), title="", x="", y="")
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', canvas.svg)]
    assert places == sorted(places, reverse=True)


def test_one_point_and_equal_points():
    assert scatter(points()[:1], title="", x="", y="").svg.count("<circle") == 1
    assert scatter([points()[0]] * 2, title="", x="", y="").svg.count("<circle") == 2


def test_many_and_long_names_all_have_room():
    """As many as `vivace tune` tries, and a calibration's path in one of them."""
    many = [Point(name=f"{'planned:file=' + 9 * '/long'}:{i}", role="candidate", x=1 + i, y=i) for i in range(60)]
    canvas = scatter(many, title="", x="x", y="y")
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>\d+  (\S+)</text>', canvas.svg)
    assert len(names) == 60
    assert all(name.startswith("planned:file=") and name.endswith(f":{59 - i}") for i, (_, _, name) in enumerate(names))
    assert max(float(y) for _, y, _ in names) < canvas.image.height / SCALE
    ink = canvas.image.convert("L").point(lambda level: 255 * (level < 250)).getbbox()
    assert ink is not None
    assert ink[2] < canvas.image.width - 1, "the last letters are inside"
