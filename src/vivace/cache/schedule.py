"""Which steps to compute, and of what sums of computed outputs the others are: from the outputs of exact runs.

Along one exact run the outputs are v_0 ... v_(N-1). Whatever nodes k an estimate of v_s is made of, its error
||sum_k w_k v_k - v_s|| follows from the outputs' inner products alone, and so do the weights that make it least. Every
schedule can therefore be judged without running the model again, and the best is found by dynamic programming. How much
an error at step s matters for the final latent is measured by real runs (`gain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, sqrt

import torch

from vivace.cache.calibration import NODES

REACH = 8
"""Steps from one computed step to the next, at most: beyond, the errors are no longer small."""

RIDGE = 1e-8
"""Of the outputs' mean square: outputs nearly alike would else get large weights of both signs, which amplify noise."""

AMPLIFIED = 0.0
"""How much of what later steps make of an error counts, as a power: at 1 the error of the final latent, at 0 the error
as it is made. What is made of an early error is mostly another picture, as good a one, and a late error damages the one
there is: of 1, 0.75, 0.5, 0.25 and 0 the captions were right most often at 0 (`recipes/builtin/plans.py`)."""

Nodes = tuple[int, ...]
"""The last computed steps, newest last; at most NODES."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Steps to compute, the weights of the last computed outputs for each other one, and the expected error."""

    compute: tuple[int, ...]
    weights: Mapping[int, tuple[float, ...]]  # newest last
    error: float  # counted, relative to the final latent


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """What is known of a run of N steps."""

    times: tuple[float, ...]  # as the scheduler counts
    products: torch.Tensor  # [N, N] float64: <v_i, v_j> relative to the final latent's square, mean over prompts
    gain: Sequence[float]  # of every step: relative error of the final latent per error of the output
    effect: Sequence[float]  # of every step: what the scheduler adds to the final latent per unit of the output
    amplified: float = AMPLIFIED
    _known: dict[tuple[Nodes, int], float] = field(default_factory=dict, init=False)

    @cached_property
    def steps(self) -> int:
        return len(self.times)

    def change(self, step: int, *, since: int) -> float:
        """How far the output of `step` is from that of an earlier step, relative to the final latent."""
        return self._size(self._one(step) - self._one(since))

    def fit(self, nodes: Nodes, wanted: torch.Tensor) -> torch.Tensor:
        """The sum of the nodes' outputs that is nearest to the sum `wanted`, both as [N] weights of outputs."""
        chosen = list(_distinct(nodes, self.times))
        among = self.products[chosen][:, chosen]
        ridge = RIDGE * among.diagonal().mean() * torch.eye(len(chosen), dtype=among.dtype)
        found = torch.zeros_like(wanted)
        found[chosen] = torch.linalg.solve(among + ridge, self.products[chosen] @ wanted)
        return found

    def gap(self, nodes: Nodes, end: int) -> float:
        """What estimating everything between the newest node and step `end` counts.

        Errors within a gap point the same way, so they add up.
        """
        return sum(self._estimated(nodes, step) for step in range(nodes[-1] + 1, end))

    def weights(self, compute: Sequence[int]) -> dict[int, tuple[float, ...]]:
        """Weights for every step that is not computed; each also makes up for what those before it were wrong by."""
        found, wrong = {}, torch.zeros(self.steps, dtype=torch.float64)  # the final latent's error, in outputs
        for step in range(self.steps):
            if step not in compute:
                nodes = tuple(one for one in compute if one < step)[-NODES:]
                effect, own = self.effect[step], self._one(step)
                estimate = self.fit(nodes, own - wrong / effect if effect else own)
                wrong += effect * (estimate - own)
                found[step] = tuple(estimate[list(_distinct(nodes, self.times))].tolist())
        return found

    def _estimated(self, nodes: Nodes, step: int) -> float:
        """What estimating one step counts."""
        if (nodes, step) not in self._known:
            own = self._one(step)
            self._known[nodes, step] = self.counted(step) * self._size(self.fit(nodes, own) - own)
        return self._known[nodes, step]

    def counted(self, step: int) -> float:
        """What an error of the step's output counts: its effect, times what later steps make of it to a power."""
        gain, effect = self.gain[step], abs(self.effect[step])
        return effect * (gain / effect) ** self.amplified if effect else gain

    def _one(self, step: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(step), self.steps).double()

    def _size(self, combination: torch.Tensor) -> float:
        return sqrt(max(0.0, (combination @ self.products @ combination).item()))


def schedules(errors: Errors, *, back: int = NODES) -> dict[int, Choice]:
    """The best schedule for every number of computed steps, where estimates go by the last `back` computed ones.

    Errors of different gaps add up as independent ones do.
    """
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
                after = (*nodes, step)[-back:]
                if candidate < following.get(after, (inf, ())):
                    following[after] = candidate
        if best[1]:
            found[count] = Choice(compute=best[1], weights=errors.weights(best[1]), error=sqrt(best[0]))
        reached = following
    return found


def uniform(steps: int, count: int) -> tuple[int, ...]:
    """`count` of `steps` steps, evenly spread: what a plan must beat."""
    return tuple(sorted({round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}))


def _distinct(nodes: Nodes, times: Sequence[float]) -> Nodes:
    """Without those whose time a newer one repeats (Heun, PNDM), as `Trail` keeps them."""
    return tuple(n for i, n in enumerate(nodes) if i + 1 == len(nodes) or times[n] != times[nodes[i + 1]])
