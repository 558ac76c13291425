"""The course of one training stage: its steps, learning rate, averaged weights, and the curve it leaves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass
class Course:
    """Runs a stage for `steps` steps.

    The learning rate rises over `warmup` steps and falls to zero along a cosine. `first` and `last` are the shares of
    the whole schedule that this call covers, so that a long stage can be run in several calls.
    """

    name: str
    peak: float
    steps: int
    warmup: int = 300
    first: float = 0.0
    last: float = 1.0
    curve: list[dict[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[float]:
        """Yields the progress through the whole schedule, in [0, 1), before every step."""
        for step in range(self.steps):
            yield self.first + (self.last - self.first) * step / self.steps

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def rate(self, progress: float, step: int) -> float:
        """The learning rate at this progress."""
        return self.peak * min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))

    def log(self, step: int, **values: float) -> None:
        row = {"stage": self.name, "step": step, "seconds": round(self.elapsed(), 1)} | {
            name: round(float(value), 5) for name, value in values.items()
        }
        self.curve.append(row)
        print(json.dumps(row), flush=True)

    def figures(self) -> dict[str, float]:
        """The last value of everything that was logged."""
        return {name: value for row in self.curve for name, value in row.items() if name != "stage"}

    def compare(self, one: str, other: str) -> None:
        """Log by how much a figure is above another one."""
        known = self.figures()
        self.log(int(known["step"]), **{f"{one} less {other}": known[one] - known[other]})

    def save(self, folder: Path) -> None:
        path = folder / "curves.json"
        earlier = json.loads(path.read_text())["curve"] if path.exists() else []
        path.write_text(json.dumps({"curve": earlier + self.curve}, indent=0) + "\n")


class Average:
    """Exponential moving average of the weights, the window growing with the steps taken: 1 - 10 / (step + 10)."""

    def __init__(self, module: nn.Module, longest: float):
        self.live = [p for p in module.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]
        self.longest = longest
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        weight = max(1 - self.longest, 10 / (self.step + 10))
        torch._foreach_lerp_(self.mean, self.live, weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and the averaged ones; call again to swap back."""
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)


def optimizer(groups: list[dict], weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW whose groups keep their learning rate relative to the peak in `share`; a CUDA graph can hold its step."""
    fused = torch.cuda.is_available()
    optim = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused, capturable=fused)
    for group in optim.param_groups:
        group["lr"] = torch.zeros((), device=group["params"][0].device)
    return optim


def follow(optims: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate, in place."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"].fill_(rate * group.get("share", 1.0))


def update(optims: Sequence[torch.optim.Optimizer], loss: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    """One clipped step down the loss."""
    for optim in optims:
        optim.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optim in optims:
        optim.step()
