"""The teacher's solvers, in terms of the picture that the denoiser sees: one form for epsilon, v and flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from vivace.distill.levels import Levels, Straight

Solver = Literal["euler", "multistep"]


def solver_of(asked: str, levels: Levels) -> Solver:
    """The solver that `auto` means for these levels, or the one asked for."""
    if asked == "auto":
        return "euler" if isinstance(levels, Straight) else "multistep"
    return "euler" if asked == "euler" else "multistep"


@torch.no_grad()
def rollout(
    x: torch.Tensor,
    grid: torch.Tensor,
    denoised: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    levels: Levels,
    solver: Solver,
) -> torch.Tensor:
    """Follow `denoised(x, sigma)` from x [B, C, H, W] at grid[0] down to grid[-1]; grid is float64, falling.

    `euler` is DDIM (arXiv 2010.02502), which for flow models is Euler's method; `multistep` is DPM-Solver++ 2M
    (arXiv 2211.01095), its first and its last step of first order.
    """
    alphas = levels.alpha(grid)
    before: torch.Tensor | None = None
    steps = len(grid) - 1
    for index in range(steps):
        sigma, following = grid[index], grid[index + 1]
        picture = denoised(x, sigma.expand(len(x)))
        used = picture
        if solver == "multistep" and before is not None and following > 0:
            used = picture + _slope(alphas, grid, index) * (picture - before)
        before = picture
        # alpha' D + sigma' / sigma (x - alpha D): exact where D stands still, at any parametrisation.
        ratio = (following / sigma).item()
        keep = (alphas[index + 1] - alphas[index] * (following / sigma)).item()
        x = ratio * x + keep * used
    return x


def _slope(alphas: torch.Tensor, grid: torch.Tensor, index: int) -> float:
    """1 / (2 r), where r is the last step over the next in log(alpha / sigma)."""
    snr = (alphas[index - 1 : index + 2] / grid[index - 1 : index + 2]).log()
    return ((snr[2] - snr[1]) / (snr[1] - snr[0]) / 2).item()
