"""Work spread over workers of a cluster, each with a model of its own; what a worker had when it died is done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vivace.cluster.crew import Crew, Task


def spread(
    make: Callable[[], Callable[[Task], Any]],
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    called: Callable[[Task], str] = str,
) -> Iterator[tuple[Task, Any]]:
    """Each task and what came of it, in the order in which they are done, by a Crew of `workers` for these alone.

    None of them: one a GPU, or one where the cluster has none. Raises InputError, as a Crew does.
    """
    if not tasks:
        return
    with Crew(make, workers=workers, most=len(tasks)) as crew:
        yield from crew.do(tasks, called=called)
