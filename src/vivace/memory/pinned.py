"""Host memory that a GPU can read without a detour."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from vivace.errors import InputError

MARGIN = 2 << 30
"""Bytes of host memory that are left to everything else."""


# Of a control group, in its second version and in its first: the limit, what is taken, and how much of that the system
# keeps of files and gives back when it is asked for.
NAMES = ("memory.max", "memory.current", "inactive_file")
OLD_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


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


def available(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can still be had, None where the system does not say.

    A container that is given less than the machine has ends when it takes more than that.
    """
    found = _figures(root / "proc/meminfo").get("MemAvailable:")
    rooms = [] if found is None else [found * 1024]
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds == "" or "memory" in kinds.split(","):
            top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
            names = OLD_NAMES if kinds else NAMES
            group = top / path.lstrip("/")
            # A container sees its own as the top one, whatever its path is outside.
            rooms += [_left(one, names) for one in {top, group, *group.parents} if one.is_relative_to(top)]
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def _left(group: Path, names: tuple[str, str, str]) -> int | None:
    """Bytes that a control group may still take, what the system keeps of files included; None without a limit."""
    most, used, files = names
    try:
        limit, taken = ((group / name).read_text().strip() for name in (most, used))
        return max(0, int(limit) - int(taken) + _figures(group / "memory.stat").get(files, 0))
    except (OSError, ValueError):  # "max"
        return None


def _figures(file: Path) -> dict[str, int]:
    """Names and numbers, a pair in front of each line."""
    pairs = [line.split()[:2] for line in file.read_text().splitlines()] if file.exists() else []
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def gib(nbytes: float) -> str:
    """Bytes in words."""
    return f"{nbytes / 2**30:.2f} GiB"
