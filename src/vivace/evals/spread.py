"""A comparison drawn by a cluster's workers, each its share of the prompts, into one folder that all of them see."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vivace.cluster.connect import gpus
from vivace.cluster.spread import spread
from vivace.config import Config
from vivace.evals.comparison import draw_all
from vivace.evals.contest import Contest, Contestant
from vivace.evals.store import Store
from vivace.load import find, load_source

LOOK = 0.5  # seconds between two looks at what the others have drawn


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every worker is told."""

    model: str
    folder: Path
    presets: Sequence[str]
    configs: Mapping[str, Config]
    prompts: tuple[str, ...]
    steps: int
    seed: int
    call: Mapping[str, Any]
    ranks: int
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a worker knows when everything is drawn."""

    place: str
    reference: Contestant
    others: list[Contestant]


def draw(order: Order, *, make: Callable[[Order], Callable[[int], Drawn]] | None = None) -> Drawn:
    """Have the connected cluster's workers draw what is missing of a comparison. Raises InputError.

    A worker that dies is started again, and goes on where its records end.
    """
    found = [drawn for _, drawn in spread(partial(make or share, order), range(order.ranks), workers=order.ranks)]
    return found[0]


def share(order: Order) -> Callable[[int], Drawn]:
    """In a worker: the model, loaded once, and what draws one rank's share of the prompts with it."""
    source = find(order.model)
    pipe = load_source(source, device=order.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(rank: int) -> Drawn:
        contest = Contest(
            pipe=pipe, model=source.name, prediction=source.prediction, prompts=order.prompts,
            store=Store(order.folder, rank=rank), steps=order.steps, seed=order.seed, call=order.call, rank=rank,
            ranks=order.ranks,
        )  # fmt: skip
        contest.together = partial(_wait, contest)
        reference, others = draw_all(contest, presets=order.presets, configs=order.configs)
        return Drawn(place=contest.place, reference=reference, others=others)

    return draw


def ranks_of(prompts: Sequence[str], *, workers: int | None) -> int:
    """How many workers share the prompts: as many as asked for, else one a GPU, else one."""
    return max(1, min(workers or gpus() or 1, len(prompts)))


def _wait(contest: Contest, contestant: Contestant) -> None:
    """Until all of a contestant's drawings are there, whoever draws them, and however often he starts anew."""
    while len(contest.of(contestant)) < len(contest.prompts):
        time.sleep(LOOK)
