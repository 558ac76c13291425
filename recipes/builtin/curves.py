"""Plot the built-in model's training: `python recipes/builtin/curves.py JSON` writes docs/training.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import pyplot

COUNTS = {"right": "all", "one": "one object", "two": "two objects", "three": "three objects"}


def plot(figures: Path, *, to: Path) -> None:
    """The transformer's losses and quizzes, from the curves of a run, as a PNG."""
    curve = json.loads(figures.read_text())["curve"]
    losses = [row for row in curve if "flow" in row]
    quizzes = [row for row in curve if "right" in row]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.semilogy([row["step"] for row in losses], [row["flow"] for row in losses], label="flow matching")
    left.semilogy([row["step"] for row in losses], [row["teach"] for row in losses], label="teaching heads")
    left.set(title="Loss", xlabel="step of 512 pictures")
    for key, name in COUNTS.items():
        steps, shares = [row["step"] for row in quizzes], [100 * row[key] for row in quizzes]
        right.plot(steps, shares, marker="o", markersize=3, label=name, linewidth=2.5 if key == "right" else 1)
    right.set(
        title="Fresh captions drawn right, averaged weights", xlabel="step of 512 pictures", ylabel="%", ylim=(0, 100)
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    to.parent.mkdir(exist_ok=True)
    figure.savefig(to, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="OUT/curves.json, or the transformer's figures under benchmarks/")
    parser.add_argument("--to", type=Path, default=Path("docs/training.png"))
    given = parser.parse_args()
    plot(given.figures, to=given.to)


if __name__ == "__main__":
    main()
