"""Times: device events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # calls after the first: a graph recorder needs two, an autotuner one
FEWEST, MOST, SECONDS = 7, 100, 3.0
"""How many calls are timed: as many as fit in so many seconds, within these bounds."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device is done with one call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def samples(call: Callable[[], Any], device: torch.device, *, fewest: int = FEWEST) -> list[float]:
    """Milliseconds of each of several calls, one after the other without a gap; the caller has warmed up."""
    once, _ = wall(call, device)
    count = min(MOST, max(fewest, int(SECONDS / max(once, 1e-6))))
    if device.type != "cuda":
        return [wall(call, device)[0] * 1e3 for _ in range(count)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def summary(times: list[float]) -> dict[str, Any]:
    """The median, the spread and the samples, in milliseconds."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": round(statistics.median(times), 4),
        "quartiles_ms": [round(low, 4), round(high, 4)],
        "samples_ms": [round(value, 4) for value in times],
    }
