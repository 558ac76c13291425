"""Which stage a batch belongs to, and how its noise level is drawn from the teacher's grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from vivace.distill.config import Stage


def stage_at(stages: Sequence[Stage], batch: int) -> int:
    """The index of the stage that batch number `batch` (from 0) belongs to; after the end, the last one."""
    end = 0
    for index, stage in enumerate(stages):
        end += stage.batches
        if batch < end:
            return index
    return len(stages) - 1


def mixture(
    stage: Stage, *, kind: Literal["modes", "uniform", "gaussian"] = "modes", variance: float = 0.5
) -> torch.Tensor:
    """The probability of every index of the teacher's grid, 0 being pure noise: [K] float64.

    With modes at m K / M of weight w_m, p(i) is proportional to sum_m w_m exp(-(i - m K / M)^2 / variance)
    (arXiv 2406.02347, section 3.2): for K = 32 and M = 4 the modes are the steps of a four-step sampler.
    """
    count = stage.steps
    index = torch.arange(count, dtype=torch.float64)
    if kind == "uniform":
        weight = torch.ones(count, dtype=torch.float64)
    elif kind == "gaussian":
        weight = torch.exp(-((index - count / 2) ** 2) / count)
    else:
        modes = torch.tensor(stage.modes, dtype=torch.float64)
        places = torch.arange(len(modes), dtype=torch.float64) * (count // len(modes))
        weight = (modes * torch.exp(-((index[:, None] - places) ** 2) / variance)).sum(1)
    return weight / weight.sum()


def steps_before(stage: Stage, index: int) -> list[int]:
    """The places on the teacher's grid of the few-step sampler's steps that lead to `index`: those before its mode."""
    apart = stage.steps / len(stage.modes)
    return [round(mode * apart) for mode in range(min(round(index / apart), len(stage.modes)))]
