"""What every stage has to reach before the next one begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure, and the least or the most that it may be."""

    figure: str
    least: float = float("-inf")
    most: float = float("inf")

    def missed(self, figures: Mapping[str, float]) -> str | None:
        """What is wrong, in words; None where the figure is as it has to be."""
        value = figures[self.figure]
        if self.least <= value <= self.most:
            return None
        bound = f"at least {self.least:g}" if value < self.least else f"at most {self.most:g}"
        return f"{self.figure} is {value:.4g}, it has to be {bound}"


# Shares of held-out renders and of their reconstructions that are read entirely right, PSNR in dB, shares of fresh
# captions drawn right. Where the model's own bars say nothing of a stage, what a run that reached them had there, less
# a margin: 40.7 dB, and 89 % drawn right half-way.
GATES = {
    "reader": (Bar(figure="renders", least=0.995),),
    "autoencoder": (Bar(figure="psnr", least=38.0),),
    "reader2": (Bar(figure="renders", least=0.995), Bar(figure="reconstructions", least=0.99)),
    "transformer:0-0.46": (Bar(figure="right", least=0.8),),
    "transformer:0.46-1": (Bar(figure="right", least=0.9), Bar(figure="heldout less right", least=-0.05)),
    "publish": (
        Bar(figure="right", least=0.9),
        Bar(figure="right at few steps", least=0.8),
        Bar(figure="megabytes", most=26.0),
        Bar(figure="megabytes of the largest file", most=15.0),
    ),
    "evaluate": (
        Bar(figure="right", least=0.9),
        Bar(figure="heldout less right", least=-0.05),
        Bar(figure="renders", least=0.995),
        Bar(figure="right at few steps", least=0.8),
    ),
}


def missed(stage: str, figures: Mapping[str, float]) -> list[str]:
    """What a stage did not reach, a line each."""
    return [line for bar in GATES.get(stage, ()) if (line := bar.missed(figures))]
