"""What the HTTP routes ask of whatever draws: an Engine in this process, or a Fleet of them elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vivace.serve.failures import Busy
    from vivace.serve.job import Job
    from vivace.serve.model import Model
    from vivace.serve.request import Request
    from vivace.serve.worker import Batch


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether requests can be taken, and if not, why."""

    ready: bool
    reason: str  # "" when ready


class Studio(Protocol):
    """Takes requests, and draws them."""

    @property
    def models(self) -> Mapping[str, Model]:
        """Alias -> model; the first is the default one."""
        ...

    @property
    def most_queued(self) -> int: ...

    @property
    def most_taken(self) -> int:
        """Requests that there is room for when there are no others, running and waiting."""
        ...

    @property
    def queued(self) -> int:
        """Requests that wait to begin."""
        ...

    @property
    def running(self) -> int: ...

    def submit(self, request: Request, *, most_pixels: int | None = None) -> Job:
        """Queue a request. Raises InputError for one that cannot be done, Busy for a full queue, Unavailable."""
        ...

    def busy(self) -> Busy:
        """What a full queue answers."""
        ...

    def model(self, alias: str | None) -> Model:
        """The model of an alias; None: the default one. Raises UnknownModelError."""
        ...

    def loaded(self, alias: str) -> bool:
        """Whether the weights of a model are there."""
        ...

    def load(self, *aliases: str) -> None:
        """Load models now rather than at their first request; none named: all. Raises InputError, Failure."""
        ...

    def health(self) -> Health:
        """Whether requests can be taken now."""
        ...

    def observe(self, *, batch: Callable[[Batch], None], job: Callable[[Job], None]) -> None:
        """Have every module call and every finished job told from now on."""
        ...
