"""The machine a figure was measured on: processor, memory, GPUs, versions. The header of every benchmark file."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vivace", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def machine(*, gpus: bool = True) -> dict[str, Any]:
    """The facts of this machine as JSON values; without `gpus`, torch is not imported.

    `memory_bytes` is the host's; each GPU says name, compute capability, memory and multiprocessors.
    """
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }
    if gpus:
        facts |= _gpus()
    return facts


def installed(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not a POSIX system
        return None


def _gpus() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "gpus": [
            {
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "memory_bytes": card.total_memory,
                "multiprocessors": card.multi_processor_count,
            }
            for card in cards
        ],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
