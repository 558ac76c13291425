"""Cold starts on this machine: `python -m vivace.bench.timings` writes benchmarks/<date>-cpu-timings.json."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from vivace.machine import machine

logger = logging.getLogger(__name__)

RUNS = 5
PROMPT = "a large green triangle to the right of a small red circle on a yellow background"


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, each as a command line; the first picture only where the built-in model is there.

    Pictures are written to `folder`.
    """
    cold = {
        "import vivace": [sys.executable, "-c", "import vivace"],
        "vivace --help": [sys.executable, "-m", "vivace", "--help"],
    }
    if resources.files("vivace.builtin").joinpath("model", "model_index.json").is_file():
        picture = ["generate", PROMPT, "-o", str(folder / "first.png"), "--overwrite", "--device", "cpu"]
        cold["vivace generate"] = [sys.executable, "-m", "vivace", *picture]
    return cold


def seconds(command: Sequence[str], *, runs: int = RUNS) -> list[float]:
    """Wall seconds of `runs` fresh processes, process start included, after one unmeasured run that warms the disk.

    Raises CalledProcessError when the command fails.
    """
    measured = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        measured.append(time.perf_counter() - start)
    return measured[1:]


def timings() -> dict[str, Any]:
    """The medians and their samples, with the machine and its load at the start."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: _row(seconds(command)) for name, command in commands(Path(folder)).items()}
    return {
        "command": "make timings",
        "machine": machine(gpus=False) | {"load_average": load},
        "unit": "seconds, fresh process",
        "timings": rows,
    }


def _row(samples: Sequence[float]) -> Mapping[str, Any]:
    return {"median": round(statistics.median(samples), 4), "samples": [round(s, 4) for s in samples]}


def main(folder: Path = Path("benchmarks")) -> Path:
    """Writes today's file, in place of an earlier one of today, and says where."""
    result = timings()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-cpu-timings.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["timings"].items():
        logger.info("%s: %.3f s (median of %d)", name, row["median"], len(row["samples"]))
    logger.info("written to %s", path)
    return path


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
