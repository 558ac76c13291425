"""Where a bench runs: the machine, its device and its type, asked in a process of its own.

A process that has touched a GPU holds some of its memory until it ends, and the bench must hold none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from vivace.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Place:
    """One machine, and the device and type that a bench uses there."""

    machine: dict[str, Any]
    device: str
    dtype: str

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")


def place(*, device: str | None = None, dtype: str | None = None) -> Place:
    """The machine, with the device and type asked for or its best ones. Raises InputError where it lacks them."""
    ended = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps([device, dtype])], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"the machine could not be examined: {ended.stderr.strip()[-400:]}")
    found = json.loads(ended.stdout.splitlines()[-1])
    if "error" in found:
        raise InputError(found["error"])
    return Place(**found)


def main(asked: str) -> None:
    """The child process: prints the place, or what is wrong with what was asked, as one line of JSON."""
    from vivace.load import resolve_device, resolve_dtype
    from vivace.machine import machine

    device, dtype = json.loads(asked)
    try:
        where = resolve_device(device)
        number = resolve_dtype(dtype, where)
    except InputError as error:
        sys.stdout.write(json.dumps({"error": str(error)}))
        return
    facts = machine(gpus=where.type == "cuda")
    sys.stdout.write(json.dumps({"machine": facts, "device": str(where), "dtype": str(number).removeprefix("torch.")}))


if __name__ == "__main__":
    main(sys.argv[1])
