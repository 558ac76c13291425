"""Room for models: who stays on the device, who is parked in host memory, who is dropped; least recently used first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vivace.memory.pinned import available

if TYPE_CHECKING:
    from vivace.serve.model import Model


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many bytes of weights may be where.

    A parked model comes back with a copy, without its files and without being accelerated anew. Where a model computes
    on the host, parking it frees nothing: that is only done where `host` says so.
    """

    device: int | None = None  # that stay loaded; None: all
    host: int | None = None  # that are parked; None: half of the host's free memory

    def make(self, coming: Model, models: Iterable[Model]) -> None:
        """Have models leave that nobody uses until `coming` fits."""
        if self.device is None:
            return
        models = sorted(models, key=lambda model: model.used)
        others = [model for model in models if model is not coming]
        for model in others:
            if sum(one.nbytes for one in models) + coming.expected_bytes <= self.device:
                return
            if not model.nbytes:
                continue
            if model.nbytes > self._most(model, models) or not model.park():
                model.unload()
            for parked in others:
                if parked.parked_bytes and self._held(others) > self._most(parked, models):
                    parked.unload()

    def _most(self, model: Model, models: Iterable[Model]) -> int:
        if self.host is not None:
            return self.host
        # What is parked already is not free any more.
        return 0 if model.device.type == "cpu" else ((available() or 0) + self._held(models)) // 2

    def _held(self, models: Iterable[Model]) -> int:
        return sum(one.parked_bytes for one in models)
