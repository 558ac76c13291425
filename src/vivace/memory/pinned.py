"""Host memory that a GPU can read without a detour."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from vivace.errors import InputError

MARGIN = 2 << 30
"""Bytes of host memory that are left to everything else."""


def hold(nbytes: int, *, pin: bool) -> torch.Tensor:
    """A flat tensor of `nbytes` bytes on the host, page-locked where `pin` is set, for as long as it lives.

    torch's own allocator of such memory rounds up to powers of two, which for a model's blocks would waste a third.
    Raises InputError where the host has not that much.
    """
    room = available()
    if room is not None and nbytes > room - MARGIN:
        raise InputError(
            f"{gib(nbytes)} more of host memory are needed, and {gib(room)} are free; choose a larger vram="
        )
    flat = torch.empty(nbytes, dtype=torch.uint8)
    if pin and nbytes:
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(flat.data_ptr(), nbytes, 0))
        if code:
            raise InputError(
                f"the system does not lock {gib(nbytes)} of host memory (CUDA error {code}); see ulimit -l"
            )
        weakref.finalize(flat.untyped_storage(), runtime.cudaHostUnregister, flat.data_ptr())
    return flat


def available() -> int | None:
    """Bytes of host memory that can still be had, None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def gib(nbytes: float) -> str:
    """Bytes in words."""
    return f"{nbytes / 2**30:.2f} GiB"
