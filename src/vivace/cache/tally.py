"""What a cache did: calls computed and skipped, the time that saved, and the memory it held."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch


@dataclass(eq=False)
class Count:
    """Calls of one denoiser, computed or skipped, with the time they took."""

    computed: int = 0
    skipped: int = 0
    steps: set[int] = field(default_factory=set)  # that were skipped, wholly or in part
    spans: list[tuple[bool, Any, Any]] = field(default_factory=list)  # skipped, begin, end

    def seconds(self, *, skipped: bool) -> list[float]:
        """What the calls of one kind took. On a GPU this waits for the last of them."""
        return [_between(begin, end) for kind, begin, end in self.spans if kind is skipped]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the saved time is the skipped calls at a computed call's usual time, less what they took."""
        computed, skipped = self.seconds(skipped=False), self.seconds(skipped=True)
        # Not the mean: a pipeline's first calls compile kernels and record graphs.
        usual = median(computed) if computed else 0.0
        return {
            "computed": self.computed,
            "skipped": self.skipped,
            "hit_rate": self.skipped / max(1, self.computed + self.skipped),
            "skipped_steps": sorted(self.steps),
            "saved_s": round(max(0.0, usual * len(skipped) - sum(skipped)), 4),
        }


class Tally:
    """Counts of every request so far, and of the last one by itself."""

    def __init__(self) -> None:
        self.requests = 0
        self.computed = 0
        self.skipped = 0
        self.peak_bytes = 0  # that one request held
        self.last = Count()
        self._lock = threading.Lock()

    def begin(self) -> Count:
        """The count of a new request."""
        with self._lock:
            self.requests += 1
            self.last = Count()
            return self.last

    def add(self, count: Count, *, step: int, skipped: bool, span: tuple[Any, Any]) -> None:
        """One call more."""
        with self._lock:
            self.computed += not skipped
            self.skipped += skipped
            count.computed += not skipped
            count.skipped += skipped
            count.steps |= {step} if skipped else set()
            count.spans.append((skipped, *span))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        calls = self.computed + self.skipped
        return {
            "requests": self.requests,
            "calls": calls,
            "hit_rate": self.skipped / max(1, calls),
            "peak_bytes": self.peak_bytes,
            "last_request": self.last.to_dict(),
        }


def mark(device: torch.device) -> Any:
    """This moment on `device`: read by `Count.seconds`, without making anything wait now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
