"""Fits of what was recorded: TeaCache's polynomial, FirstBlock's threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vivace.cache.record import Change
from vivace.cache.teacache import polynomial

DEGREE = 4


def teacache(
    fitted: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]]
) -> tuple[dict[str, Any] | None, str]:
    """The polynomial from (signal, output) changes and how well it fits the held-out ones; else the reason.

    Least squares of degree 4, highest power first, as TeaCache takes it. R² below or at 0 means that the mean of the
    fitted outputs would have done as well: then there is none.
    """
    if not fitted:
        return None, "the model has no signal to watch"
    if len(fitted) <= DEGREE + 1 or not held_out:
        return None, f"{len(fitted)} changes are too few for a polynomial of degree {DEGREE}"
    x, y = torch.tensor(fitted, dtype=torch.float64).T
    # Signals change by 1e-3 to 1: in their own unit the fourth power would drown in rounding.
    scale = x.abs().max().item() or 1.0
    powers = torch.arange(DEGREE, -1, -1, dtype=torch.float64)
    columns = (x / scale)[:, None] ** powers
    solved = torch.linalg.lstsq(columns, y[:, None], driver="gelsd").solution[:, 0]
    coefficients = [(c / scale**p).item() for c, p in zip(solved, powers, strict=True)]
    r2 = {
        name: _r2(coefficients, pairs, mean=y.mean().item())
        for name, pairs in (("fitted", fitted), ("held_out", held_out))
    }
    if not r2["held_out"] > 0:
        return None, f"no better than a constant on held-out prompts (R² {r2['held_out']:.2f})"
    return {"coefficients": coefficients, "r2": r2["held_out"], "r2_fitted": r2["fitted"]}, ""


def _r2(coefficients: Sequence[float], pairs: Sequence[tuple[float, float]], *, mean: float) -> float:
    """Share of the variance about the fitted prompts' mean that the polynomial explains."""
    left = sum((polynomial(coefficients, x) - y) ** 2 for x, y in pairs)
    whole = sum((y - mean) ** 2 for _, y in pairs)
    return 1 - left / whole if whole > 0 else 0.0


def series(logs: Sequence[Sequence[Change]]) -> list[list[tuple[float, ...]]]:
    """Per run and branch, what each step's first block changed by against 1, 2, ... steps before."""
    runs: list[list[tuple[float, ...]]] = []
    for log in logs:
        for branch in {change.branch for change in log}:
            own = [change.added for change in log if change.branch == branch]
            if any(own):
                runs.append(own)
    return runs


def threshold(runs: Sequence[Sequence[tuple[float, ...]]], share: float) -> float:
    """The FirstBlock threshold with which about `share` of the steps of `runs` would be computed, by bisection."""
    low, high = 0.0, max(value for run in runs for changes in run for value in changes) * 1.01
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if computed(runs, middle) > share else (low, middle)
    return high


def computed(runs: Sequence[Sequence[tuple[float, ...]]], at: float) -> float:
    """Share of steps computed with threshold `at`, as if skipping changed nothing in what follows."""
    count = total = 0
    for run in runs:
        last = None
        for step, changes in enumerate(run):
            back = None if last is None else step - last
            # Further back than was recorded counts as changed.
            if back is None or back > len(changes) or changes[back - 1] > at:
                last, count = step, count + 1
            total += 1
    return count / total
