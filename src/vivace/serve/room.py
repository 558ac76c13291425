"""Room for models: who stays on the device, who is parked in host memory, who is dropped; least recently used first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vivace.memory.pinned import available

if TYPE_CHECKING:
    from vivace.serve.model import Model

LOOK = 0.05  # seconds between two looks at whether there is room


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many bytes of weights may be where.

    A parked model comes back with a copy, without its files and without being accelerated anew. Where a model computes
    on the host, parking it frees nothing: that is only done where `host` says so.
    """

    device: int | None = None  # that stay loaded; None: all
    host: int | None = None  # that are parked; None: half of the host's free memory
    _door: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @contextmanager
    def made(
        self, coming: Model, models: Collection[Model], *, check: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Room for `coming`, which the block loads; one model comes at a time.

        Others leave until it fits: those that nobody uses at once, those that are used when what runs on them is over,
        for which they take nothing new. While that lasts, `check` is called, and may raise.
        """
        if self.device is None:
            yield
            return
        while not self._door.acquire(timeout=LOOK):
            check()
        try:
            while not self._make(coming, models):
                check()
                time.sleep(LOOK)
            yield
            # It may be larger than its files, in another dtype.
            self._make(coming, models)
        finally:
            for model in models:
                model.closing = False
            self._door.release()

    def fits(self, coming: Model, models: Iterable[Model]) -> bool:
        """Whether `coming` has room as it is."""
        return self._lacking(coming, models) <= 0

    def _lacking(self, coming: Model, models: Iterable[Model]) -> float:
        """Bytes that have to leave for it."""
        if self.device is None:
            return 0
        return sum(one.nbytes for one in models) + coming.expected_bytes - self.device

    def _make(self, coming: Model, models: Collection[Model]) -> bool:
        """Have others leave; whether nobody has to be waited for."""
        others = [model for model in models if model is not coming]
        lacking, waits = self._lacking(coming, models), False
        for model in sorted(others, key=lambda model: (model.active > 0, model.used)):
            nbytes = model.nbytes
            if lacking <= 0 or not nbytes:
                continue
            if (nbytes <= self._most(model, models) and model.park()) or model.unload():
                lacking -= nbytes
            elif model.close_door():
                lacking -= nbytes
                waits = True
            for parked in sorted(others, key=lambda model: model.used):
                if parked.parked_bytes and self._held(others) > self._most(parked, models):
                    parked.unload()
        return not waits

    def _most(self, model: Model, models: Iterable[Model]) -> int:
        if self.host is not None:
            return self.host
        # What is parked already is not free any more.
        return 0 if model.device.type == "cpu" else ((available() or 0) + self._held(models)) // 2

    def _held(self, models: Iterable[Model]) -> int:
        return sum(one.parked_bytes for one in models)
