"""Work spread over workers of a cluster, each with a model of its own; what a worker had when it died is done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vivace.cluster.connect import gpus
from vivace.errors import InputError

Task = TypeVar("Task")

TRIES = 3  # times that a task is begun again after its worker died: it may be what ends them


def spread(
    make: Callable[[], Callable[[Task], Any]], tasks: Sequence[Task], *, workers: int | None = None
) -> Iterator[tuple[Task, Any]]:
    """Each task and what came of it, in the order in which they are done.

    `make` runs once in every worker and returns what does a task there; both travel to other processes. A worker has
    one GPU where the cluster has some, and there are `workers` of them: None for one a GPU, or for one where there is
    none. A worker that dies is started again, elsewhere if need be, and does its task again. Raises InputError as the
    task raised it, and for a task whose workers die every time.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util import ActorPool

    if not tasks:
        return
    cards, cores = gpus(), int(ray.cluster_resources().get("CPU", 1))
    count = min(workers or cards or 1, len(tasks))
    if count > (cards or cores):
        raise InputError(f"{count} workers were asked for, and the cluster has {cards or cores} places; take fewer")
    cpus = cores // count
    place = {"num_gpus": 1, "num_cpus": 0} if cards else {"num_cpus": cpus}
    worker = ray.remote(_Worker).options(max_restarts=-1, max_task_retries=TRIES, **place)
    pool = ActorPool([worker.remote(make, str(Path.cwd())) for _ in range(count)])
    try:
        # The task comes back with its result: they are done in any order.
        for done in pool.map_unordered(lambda actor, task: actor.do.remote(task), list(tasks)):
            yield done[0], done[1]
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise
    except RayActorError as error:
        raise InputError(
            f"a worker died {TRIES + 1} times over the same task; what was made is kept, and a second run goes on"
        ) from error


class _Worker:
    """Makes what does the tasks when the first one comes, so that a worker which fails at that can say why."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        # Where relative paths begin, if this machine has the folder too.
        with suppress(OSError):
            os.chdir(folder)
        self._make = make
        self._do: Callable[[Any], Any] | None = None

    def do(self, task: Any) -> tuple[Any, Any]:
        if self._do is None:
            self._do = self._make()
        return task, self._do(task)
