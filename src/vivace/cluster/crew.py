"""Workers of a cluster, each with what it needs to do tasks; one that is lost leaves its task to the living."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from vivace.cluster.places import grows, machines, places, share
from vivace.errors import InputError

logger = logging.getLogger(__name__)

Task = TypeVar("Task")

TRIES = 3  # times that a task is begun again after its worker was lost: it may be what ends them
LOOK = 1.0  # seconds between two looks at whether a worker can still come
PATIENCE = 30.0  # seconds without a worker and without room for one, after which none is waited for


@dataclass(eq=False, kw_only=True)
class Worker:
    """One that was started. Where it is, is known when it is there."""

    actor: Any
    name: str = ""


@dataclass(kw_only=True)
class Work(Generic[Task]):
    """A task, and the workers it has cost."""

    task: Task
    lost: int = 0


class Crew(Generic[Task]):
    """As many workers as asked for, for as many tasks as come: one a GPU where the cluster has some.

    `make` runs once in every worker and returns what does a task there; both travel to other processes. Only a worker
    that is there gets a task, so that one whose machine is gone keeps nothing waiting. Raises InputError where there is
    no room for all.
    """

    def __init__(self, make: Callable[[], Callable[[Task], Any]], *, workers: int | None, most: int) -> None:
        self._make = make
        self._place = place_of(workers, most=most)
        self._coming: dict[Any, Worker] = {}  # by what Ray tells when it is there
        self._idle: list[Worker] = []
        self._busy: dict[Any, tuple[Worker, Work[Task]]] = {}  # by what its result comes in
        self._lost: list[str] = []
        self._hopeless: float | None = None  # since when there is neither a worker nor room for one
        for _ in range(self._place.pop("workers")):
            self._start()

    def __enter__(self) -> Crew[Task]:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for worker in (*self._coming.values(), *self._idle, *(worker for worker, _ in self._busy.values())):
            ray.kill(worker.actor)

    def do(self, tasks: Sequence[Task], *, called: Callable[[Task], str] = str) -> Iterator[tuple[Task, Any]]:
        """Each task and what came of it, in the order in which they are done.

        Raises InputError as a task raised it, for a task that loses every worker, and where no worker is left and none
        can come; it names what was lost. `called` is what a task goes by there.
        """
        import ray

        waiting = deque(Work(task=task) for task in tasks)
        while waiting or self._busy:
            while waiting and self._idle:
                worker, work = self._idle.pop(), waiting.popleft()
                self._busy[worker.actor.do.remote(work.task)] = worker, work
            done, _ = ray.wait([*self._busy, *self._coming], timeout=LOOK)
            for told in done:
                if told in self._coming:
                    self._arrive(told)
                elif (found := self._result(told, waiting, called=called)) is not None:
                    yield found
            if not done:
                self._hope(len(waiting))

    def _start(self) -> None:
        """Ask for a worker. It comes when there is room for it, which may be never."""
        import ray

        # Its lost tasks are ours to give away, which Ray would keep for it.
        actor = ray.remote(_Hands).options(max_restarts=0, **self._place).remote(self._make, str(Path.cwd()))
        self._coming[actor.name.remote()] = Worker(actor=actor)

    def _arrive(self, told: Any) -> None:
        import ray
        from ray.exceptions import RayError

        worker = self._coming.pop(told)
        try:
            worker.name = ray.get(told)
        except RayError as error:
            self._lost.append(f"a worker that did not start: {str(error).strip().splitlines()[-1]}")
            if len(self._lost) > TRIES and not (self._idle or self._busy):
                raise InputError(f"the workers do not start; {self._lost[-1]}") from None
            self._start()
        else:
            self._idle.append(worker)
            self._hopeless = None

    def _result(
        self, told: Any, waiting: deque[Work[Task]], *, called: Callable[[Task], str]
    ) -> tuple[Task, Any] | None:
        """A task with what came of it; None where its worker was lost, and it waits again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        worker, work = self._busy.pop(told)
        try:
            result = ray.get(told)
        except RayTaskError as error:
            self._idle.append(worker)
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise
        except RayError as error:
            # The worker's end, or of the result alone: then it may live, and would keep its place from the next one.
            ray.kill(worker.actor)
            work.lost += 1
            name = called(work.task)
            self._lost.append(worker.name)
            if work.lost > TRIES:
                raise InputError(
                    f"{name} has cost {work.lost} workers, at last {worker.name}; what was made is kept, and the same "
                    "command goes on"
                ) from None
            why = type(error).__name__
            logger.warning("lost %s with %s, which is done again by another (%s)", worker.name, name, why)
            waiting.appendleft(work)
            self._start()
            return None
        self._idle.append(worker)
        return work.task, result

    def _hope(self, left: int) -> None:
        """Raise InputError where nobody works, and nobody will have room to."""
        needs = {"cpus": self._place["num_cpus"], "gpus": self._place["num_gpus"]}
        if self._busy or self._idle or places(machines(), **needs) or grows():
            self._hopeless = None
            return
        self._hopeless = self._hopeless or time.monotonic()
        if time.monotonic() - self._hopeless > PATIENCE:
            raise InputError(
                f"no machine is left with room for a worker (lost: {', '.join(self._lost) or 'none'}); {left} tasks "
                "are not done, what was made is kept, and the same command goes on when there is one"
            )


def place_of(workers: int | None, *, most: int) -> dict[str, Any]:
    """How many workers there are, and what Ray is to reserve for each. Raises InputError."""
    found = machines()
    cards = places(found, gpus=1)
    count = min(workers or cards or 1, most)
    cpus = 0 if cards else share(found, workers=count)
    room = cards or places(found, cpus=1)
    if count > room:
        raise InputError(f"{count} workers were asked for, and the cluster has {room} places; take fewer")
    return {"workers": count, "num_cpus": cpus, "num_gpus": 1 if cards else 0}


class _Hands:
    """Makes what does the tasks when the first one comes, so that a worker which fails at that can say why."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        # Where relative paths begin, if this machine has the folder too.
        with suppress(OSError):
            os.chdir(folder)
        self._make = make
        self._do: Callable[[Any], Any] | None = None

    def name(self) -> str:
        import ray

        return f"process {os.getpid()} on {ray.util.get_node_ip_address()}"

    def do(self, task: Any) -> Any:
        if self._do is None:
            self._do = self._make()
        return self._do(task)
