"""What a GPU draws while it is timed, and its clock: at the power limit every operation slows down with the rest."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EVERY_MS = 100
FIELDS = "clocks.sm,power.draw,clocks_event_reasons.sw_power_cap"


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fills the dict it gives when it is left: `clock_mhz` and `watts`, medians, and `capped`, the share of the time at
    the power limit. It stays empty on a CPU, and where `nvidia-smi` is missing or knows no such figures."""
    drawn: dict[str, Any] = {}
    program = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if program is None:
        yield drawn
        return
    uuid = torch.cuda.get_device_properties(device).uuid
    command = [program, f"--id=GPU-{uuid}", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    with subprocess.Popen([*command, f"--loop-ms={EVERY_MS}"], stdout=subprocess.PIPE, text=True) as reading:
        try:
            yield drawn
        finally:
            reading.terminate()
            assert reading.stdout is not None
            drawn |= summary(reading.stdout.read())


def summary(lines: str) -> dict[str, Any]:
    """The medians of lines like `1500, 691.31, Active`; {} where none of them can be read."""
    found = [(float(clock), float(watts), cap) for clock, watts, cap in filter(None, map(_fields, lines.splitlines()))]
    if not found:
        return {}
    clocks, watts, caps = zip(*found, strict=True)
    return {
        "clock_mhz": statistics.median(clocks),
        "watts": statistics.median(watts),
        "capped": round(caps.count("Active") / len(caps), 3),
    }


def _fields(line: str) -> tuple[str, str, str] | None:
    parts = [part.strip() for part in line.split(",")]
    readable = len(parts) == 3 and all(part.replace(".", "", 1).isdigit() for part in parts[:2])
    return (parts[0], parts[1], parts[2]) if readable else None
