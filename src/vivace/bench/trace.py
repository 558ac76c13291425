"""Where a call's time goes: a trace for a viewer, and the operations that take the most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recorded

CALLS = 3
ROWS = 25


def profile(call: Callable[[], Any], path: Path) -> list[dict[str, Any]]:
    """Records a few calls, writes a Chrome trace to `path` (`.json.gz`), and returns the costliest kernels.

    Each row has the kernel's name, its launches and its milliseconds in one call, and its share of all kernels' time.
    On a CPU the rows are operators.
    """
    cuda = torch.cuda.is_available()
    with recorded(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recording:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize()
    recording.export_chrome_trace(str(path))
    device, time = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    events = [event for event in recording.key_averages() if event.device_type == device]
    total = sum(getattr(event, time) for event in events)
    costly = sorted(events, key=lambda event: getattr(event, time), reverse=True)[:ROWS]
    return [
        {
            "name": event.key[:160],
            "launches": round(event.count / CALLS, 1),
            "ms": round(getattr(event, time) / CALLS / 1e3, 4),
            "share": round(getattr(event, time) / total, 4) if total else 0.0,
        }
        for event in costly
    ]
