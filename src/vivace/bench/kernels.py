"""Every kernel at the shapes that models use, against the least time its bytes can take.

`python -m vivace.bench.kernels RESULTS.jsonl CASE...` times the named cases ("kernel/case"), each appended when done;
`bench_kernels` calls it, and again without the case at which a process ended.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vivace.bench.book import Book
from vivace.bench.process import Children

logger = logging.getLogger(__name__)

COPY_BYTES = 2**30
LAUNCHES = 64  # in one graph: the host's launch time disappears, and a clock tick is small beside them
CACHE_BYTES = 256 * 2**20
"""Several times a GPU's cache: arguments and results taken in turn fill as much, so that none is found there."""


def bench_kernels(
    folder: Path,
    *,
    machine: Mapping[str, Any],
    command: str,
    seconds: float,
    on_line: Callable[[Mapping[str, Any]], None],
) -> None:
    """Appends a line for each case of each kernel to the folder's book; a crash costs the case that it came with."""
    from vivace.kernels import KERNELS

    left = [f"{name}/{case.name}" for name, kernel in KERNELS.items() for case in kernel.bench]
    book = Book(folder)
    while left:
        lines, said = _some(left, seconds=seconds)
        if not lines:
            kernel, _, case = left[0].partition("/")
            lines = [{"kernel": kernel, "case": case, "status": "failed", "why": said}]
        for line in lines:
            line |= {"command": command, "machine": machine}
            book.append(line)
            on_line(line)
        left = left[len(lines) :]


def _some(left: list[str], *, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """The lines of one process, in the order of `left`, and the last thing it said."""
    with tempfile.TemporaryDirectory() as scratch, Children("vivace.bench.kernels") as children:
        path = Path(scratch) / "lines.jsonl"
        path.touch()
        ended = children.run([str(path), *left], seconds=seconds)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = next(
        (line for line in reversed(ended.said.splitlines()) if line.strip()), f"not finished in {seconds:.0f} s"
    )
    return lines, last[:240]


def main(path: str, *names: str) -> None:
    """The child process: times each named case and appends its line."""
    from vivace.kernels import KERNELS

    copy = copy_rate()
    for name in names:
        kernel, _, case_name = name.partition("/")
        case = next(case for case in KERNELS[kernel].bench if case.name == case_name)
        line = {"kernel": kernel, "case": case_name, "status": "done", **measure(KERNELS[kernel], case, copy=copy)}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def copy_rate() -> float:
    """Bytes a second that the plainest kernel moves here: each element of a large tensor read once and written once.

    Not `copy_`, which a graph turns into a transfer of the copy engines: those move two thirds of what kernels do.
    """
    import torch

    if not torch.cuda.is_available():
        from vivace.errors import InputError

        raise InputError("kernels are timed on a CUDA device, and there is none here")
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    times = _replays(lambda index: torch.neg(source, out=target), launches=4)
    return 2 * COPY_BYTES / (statistics.median(times) / 1e3)


def measure(kernel: Any, case: Any, *, copy: float) -> dict[str, Any]:
    """The median microseconds of one launch, the bound at `copy` bytes a second, and the share of it reached."""
    size = kernel.bound_bytes(case)
    turns = min(LAUNCHES, max(2, CACHE_BYTES // size))
    sets = [kernel.arguments(case, device="cuda", seed=seed) for seed in range(turns)]
    results: deque[Any] = deque(maxlen=turns)  # held, so that the next launch writes elsewhere
    times = _replays(lambda index: results.append(kernel.op(**sets[index % turns])), launches=LAUNCHES)
    took, bound = statistics.median(times) * 1e3, size / copy * 1e6
    return {
        "microseconds": round(took, 3),
        "bound_microseconds": round(bound, 3),
        "share": round(bound / took, 4),
        "bytes": size,
        "copy_tb_per_second": round(copy / 1e12, 3),
    }


def _replays(launch: Callable[[int], Any], *, launches: int, replays: int = 20) -> list[float]:
    """Milliseconds of one launch, from replays of a graph of many."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(2):  # compiles, and lets libraries choose
            launch(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / launches for start, end in events]


if __name__ == "__main__":
    main(*sys.argv[1:])
