"""Which steps to compute: dynamic programming over measured errors, with extrapolated outputs in between.

Along one exact run the outputs v_0 ... v_(N-1) are known. Whatever nodes an extrapolation uses, its error
||sum_k w_k v_k - v_s|| follows from the outputs' inner products alone, so that every schedule can be judged without
running the model again. How much an error at step s matters for the final latent is measured by real runs (`gain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, sqrt

import torch

from vivace.cache.trail import weights

ORDER = 2
"""Highest order of an extrapolation."""

REACH = 8
"""Steps from one computed step to the next, at most: beyond, the errors are no longer small."""

Nodes = tuple[int, ...]
"""The last computed steps, newest last; at most ORDER + 1."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Steps to compute, the order by which each other one is extrapolated, and the expected error."""

    compute: tuple[int, ...]
    orders: Mapping[int, int]
    error: float  # of the final latent, relative


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """What is known of a run of N steps: the time of each, inner products of outputs, and gains."""

    times: tuple[float, ...]
    products: torch.Tensor  # [P, N, N] float64: <v_i, v_j> for every prompt, relative to the final latent's size
    gain: Sequence[float]  # error of the final latent per error of the output, for every step
    _known: dict[tuple[Nodes, int], tuple[float, int]] = field(default_factory=dict)

    @cached_property
    def steps(self) -> int:
        return len(self.times)

    def local(self, nodes: Nodes, step: int, *, order: int) -> float:
        """Root mean square over prompts of the extrapolation's error at `step`, from the newest `order` + 1 nodes."""
        chosen = _distinct(nodes, self.times)[-order - 1 :]
        combination = torch.zeros(self.steps, dtype=torch.float64)
        combination[list(chosen)] = torch.tensor(
            weights([self.times[node] for node in chosen], self.times[step]), dtype=torch.float64
        )
        combination[step] -= 1
        squares = torch.einsum("i,pij,j->p", combination, self.products, combination)
        return sqrt(squares.clamp(min=0).mean().item())

    def best(self, nodes: Nodes, step: int) -> tuple[float, int]:
        """The smallest error of the final latent from extrapolating `step`, and the order that gives it."""
        key = (nodes, step)
        if key not in self._known:
            orders = range(min(ORDER, len(_distinct(nodes, self.times)) - 1) + 1)
            error, order = min((self.local(nodes, step, order=order), order) for order in orders)
            self._known[key] = (self.gain[step] * error, order)
        return self._known[key]

    def gap(self, nodes: Nodes, end: int) -> float:
        """The error of the final latent from extrapolating everything between the newest node and step `end`.

        Errors within a gap point the same way, so they add up.
        """
        return sum(self.best(nodes, step)[0] for step in range(nodes[-1] + 1, end))


def schedules(errors: Errors) -> dict[int, Choice]:
    """The best schedule for every number of computed steps. Errors of different gaps add up as independent ones do."""
    start: Nodes = (0,)
    # Nodes -> (sum of squares, the schedule so far), for one number of computed steps at a time.
    reached: dict[Nodes, tuple[float, tuple[int, ...]]] = {start: (0.0, (0,))}
    found: dict[int, Choice] = {}
    for count in range(1, errors.steps + 1):
        best = (inf, ())
        following: dict[Nodes, tuple[float, tuple[int, ...]]] = {}
        for nodes, (total, path) in reached.items():
            if errors.steps - nodes[-1] <= REACH:
                best = min(best, (total + errors.gap(nodes, errors.steps) ** 2, path))
            for step in range(nodes[-1] + 1, min(nodes[-1] + REACH, errors.steps - 1) + 1):
                candidate = (total + errors.gap(nodes, step) ** 2, (*path, step))
                after = (*nodes, step)[-ORDER - 1 :]
                if candidate < following.get(after, (inf, ())):
                    following[after] = candidate
        if best[1]:
            found[count] = _schedule(errors, best[1], sqrt(best[0]))
        reached = following
    return found


def uniform(steps: int, count: int) -> tuple[int, ...]:
    """`count` of `steps` steps, evenly spread: what a plan must beat."""
    return tuple(sorted({round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}))


def _schedule(errors: Errors, compute: tuple[int, ...], error: float) -> Choice:
    orders = {}
    for step in range(errors.steps):
        if step not in compute:
            nodes = tuple(node for node in compute if node < step)[-ORDER - 1 :]
            orders[step] = errors.best(nodes, step)[1]
    return Choice(compute=compute, orders=orders, error=error)


def _distinct(nodes: Nodes, times: Sequence[float]) -> Nodes:
    """Without those whose time a newer one repeats (Heun, PNDM), as `Trail` keeps them."""
    return tuple(n for i, n in enumerate(nodes) if i + 1 == len(nodes) or times[n] != times[nodes[i + 1]])
