"""Why a request did not get its picture, besides being wrong in itself (which is an InputError)."""

from __future__ import annotations

from functools import partial
from typing import Any

from vivace.errors import InputError


class FieldError(InputError):
    """A wrong value in one field of a request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are copied to other processes by calling their class with `args`, which is the message alone.
        return type(self), (self.field, str(self))


class UnknownModelError(FieldError):
    """No model goes by that alias."""


class Failure(RuntimeError):
    """A request that was right and still got no picture. `code` is a stable word for it."""

    code = "failed"


class Busy(Failure):
    """The queue is full; `retry_after` is in seconds."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), retry_after=self.retry_after), (str(self),)


class Cancelled(Failure):
    """Somebody cancelled the job, or nobody waits for it any more."""

    code = "cancelled"


class DeadlineExceeded(Failure):
    """It waited or ran longer than it was allowed to."""

    code = "deadline_exceeded"


class OutOfMemory(Failure):
    """The device has too little memory for it, alone and with tiles too."""

    code = "out_of_memory"


class Unavailable(Failure):
    """The engine is closing, or its device does not answer."""

    code = "unavailable"
