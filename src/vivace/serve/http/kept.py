"""Things in memory for a while, under names that nobody can guess."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by name, each for `seconds`; the oldest go when there are more than `most_bytes`."""

    def __init__(self, *, seconds: float, most_bytes: int) -> None:
        self._seconds, self._most = seconds, most_bytes
        self._held: OrderedDict[str, tuple[float, int, Value]] = OrderedDict()  # name -> expiry, bytes, value
        self._nbytes = 0
        self._lock = threading.Lock()

    def add(self, value: Value, *, nbytes: int) -> str:
        """Keep it; its name."""
        name = secrets.token_urlsafe(18)
        self.sweep()
        with self._lock:
            self._held[name] = (time.monotonic() + self._seconds, nbytes, value)
            self._nbytes += nbytes
            while self._nbytes > self._most and len(self._held) > 1:
                self._drop_oldest()
        return name

    def get(self, name: str) -> Value | None:
        """What goes by that name, while it is kept."""
        self.sweep()
        with self._lock:
            found = self._held.get(name)
        return None if found is None else found[2]

    def sweep(self) -> None:
        """Let go of what is over its time."""
        with self._lock:
            while self._held and next(iter(self._held.values()))[0] <= time.monotonic():
                self._drop_oldest()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return self._nbytes

    def _drop_oldest(self) -> None:
        _, (_, nbytes, _) = self._held.popitem(last=False)
        self._nbytes -= nbytes
