"""A comparison drawn by a cluster's workers, each its share of the prompts, into one folder that all of them see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vivace.cluster.connect import gpus
from vivace.cluster.crew import Crew
from vivace.errors import InputError
from vivace.evals.contest import Contestant, Order, contestants, controls_of, floor_of
from vivace.load import find, load_source


@dataclass(frozen=True, kw_only=True)
class Share:
    """One contestant's drawings of every `ranks`th prompt, from the `rank`th on."""

    contestant: Contestant
    rank: int

    def __str__(self) -> str:
        return f"share {self.rank + 1} of {self.contestant.name}"


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Which controls the candidates' times call for, once they are drawn."""

    reference: Contestant
    candidates: Sequence[Contestant]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is known when everything is drawn."""

    place: str
    reference: Contestant
    others: list[Contestant]


Do = Callable[[Share | Controls], Any]


def draw(order: Order, *, make: Callable[[Order], Do] | None = None) -> Drawn:
    """Have the connected cluster's workers draw what is missing of a comparison. Raises InputError.

    A share whose worker is lost is taken over by another, which goes on where the records end.
    """
    reference, candidates = contestants(presets=order.presets, configs=order.configs, steps=order.steps)
    others = [floor_of(reference), *candidates]
    with Crew(partial(make or worker, order), workers=order.ranks, most=order.ranks) as crew:
        place = _draw(crew, order, [reference, *others])
        ((_, controls),) = crew.do([Controls(reference=reference, candidates=candidates)])
        _draw(crew, order, controls)
    return Drawn(place=place, reference=reference, others=[*others, *controls])


def _draw(crew: Crew[Share | Controls], order: Order, wanted: Sequence[Contestant]) -> str:
    """Have contestants draw all prompts, and where they did. Raises InputError where machines differ."""
    shares = [Share(contestant=one, rank=rank) for one in wanted for rank in range(order.ranks)]
    found: set[str] = set()
    for _, place in crew.do(shares):
        found.add(place)
        if len(found) > 1:
            raise InputError(
                f"the workers draw on {' and on '.join(sorted(found))}, whose times and pictures do not compare; take "
                "a cluster of one kind, or --workers 1"
            )
    return next(iter(found), "")


def worker(order: Order) -> Do:
    """In a worker: the model, loaded once, and what draws a share of the prompts with it; returns where."""
    source = find(order.model)
    pipe = load_source(source, device=order.device)
    pipe.set_progress_bar_config(disable=True)

    def do(task: Share | Controls) -> Any:
        rank = task.rank if isinstance(task, Share) else 0
        contest = order.contest(pipe, prediction=source.prediction, rank=rank)
        if isinstance(task, Controls):
            return controls_of(contest, task.reference, task.candidates)
        contest.run(task.contestant)
        return contest.place

    return do


def ranks_of(prompts: Sequence[str], *, workers: int | None) -> int:
    """How many workers share the prompts: as many as asked for, else one a GPU, else one."""
    return max(1, min(workers or gpus() or 1, len(prompts)))
