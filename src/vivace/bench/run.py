"""A bench: every contestant in every workload, each in a process of its own, the quick ones first."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vivace.bench.book import Book, task_of
from vivace.bench.contestant import REFERENCE, Contestant
from vivace.bench.process import Children
from vivace.bench.workload import Workload

logger = logging.getLogger(__name__)

WORKER = "vivace.bench.worker"
LEAST = 20.0
"""Seconds of the budget under which nothing more is begun: a process takes that long to load its model."""

TOGETHER = 4


@dataclass(kw_only=True)
class Bench:
    """What to run and where to write it. Call `run`."""

    workloads: Sequence[Workload]
    contestants: Sequence[Contestant]
    folder: Path
    machine: Mapping[str, Any]
    command: str
    limit: float  # seconds of one contestant's process
    budget: float | None = None  # seconds of all together; what does not fit is left for the next time
    again: bool = False  # also what is settled already
    trace: bool = False
    reference: bool = True  # whether errors are measured, from an fp32 call of each workload
    on_line: Callable[[Mapping[str, Any]], None] = lambda line: None
    book: Book = field(init=False)

    def __post_init__(self) -> None:
        self.book = Book(self.folder)
        self._began = time.monotonic()
        self._references: dict[Workload, tuple[Path, str | None]] = {}
        self._children = Children(WORKER, together=self._together())

    def _together(self) -> int:
        """How many processes import at a time: each takes a processor, and a GiB of memory while it waits."""
        if any(workload.device == "cpu" for workload in self.workloads):
            return 1
        contests = len(self.workloads) * (len(self.contestants) + self.reference)
        return max(1, min(TOGETHER, contests, (os.cpu_count() or 1) // 4))

    def run(self) -> int:
        """Runs what has no result yet; returns how many are still without one."""
        left = 0
        with tempfile.TemporaryDirectory() as scratch, ended_by_signal(), self._children:
            # By contestant first: what a budget cuts off are the slow starters of every workload.
            for contestant in self.contestants:
                for workload in self.workloads:
                    left += not self._contest(workload, contestant, Path(scratch))
        return left

    def _contest(self, workload: Workload, contestant: Contestant, scratch: Path) -> bool:
        """Whether the contestant has a result now."""
        settled = self.book.settled(workload, contestant, machine=self.machine, limit=self.limit)
        if settled is not None and not self.again:
            return True
        reference, missing = self._reference(workload, scratch)
        seconds = self._seconds()
        if seconds is None:
            return False
        trace = self.folder / f"trace-{_stem(workload)}-{_stem(contestant)}.json.gz" if self.trace else None
        result = self._process(workload, contestant, reference=reference, trace=trace, seconds=seconds, scratch=scratch)
        if result["status"] == "not finished" and seconds < self.limit:
            return False  # the budget ended, not the limit
        line = {
            "title": workload.name,
            "contestant": contestant.label,
            "ours": contestant.ours,
            **result,
            "limit_seconds": self.limit,
            "reference": missing or "ok",
            "when": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "command": self.command,
            "workload": workload.to_dict(),
            "machine": self.machine,
        }
        self.book.append(line)
        self.on_line(line)
        return True

    def _seconds(self) -> float | None:
        """How long the next process may take; None where there is no time for one."""
        if self.budget is None:
            return self.limit
        rest = self.budget - (time.monotonic() - self._began)
        return None if rest < LEAST else min(self.limit, rest)

    def _reference(self, workload: Workload, scratch: Path) -> tuple[Path, str | None]:
        """Where the exact output lies, and why it is not there; made before a workload's first contestant."""
        if not self.reference:
            return scratch / "none", "left out"
        if workload not in self._references and (seconds := self._seconds()) is not None:
            path = scratch / f"{len(self._references)}.safetensors"
            exact = Contestant(name=REFERENCE)
            result = self._process(workload, exact, reference=path, trace=None, seconds=seconds, scratch=scratch)
            missing = None if path.is_file() else result.get("why") or result["status"]
            if missing:
                logger.warning("%s: no fp32 reference, so no errors: %s", workload.name, missing)
            self._references[workload] = path, missing
        return self._references.get(workload, (scratch / "none", "no time was left for it"))

    def _process(
        self,
        workload: Workload,
        contestant: Contestant,
        *,
        reference: Path,
        trace: Path | None,
        seconds: float,
        scratch: Path,
    ) -> dict[str, Any]:
        task, result = scratch / "task.json", scratch / "result.json"
        result.unlink(missing_ok=True)
        values = {"workload": workload.to_dict(), "contestant": task_of(contestant), "reference": str(reference)}
        task.write_text(json.dumps({**values, "trace": str(trace) if trace else None}))
        began = time.monotonic()
        ended = self._children.run([str(task), str(result)], seconds=seconds)
        took = round(time.monotonic() - began, 1)
        # A process whose work is done may still hang at its end: the result counts.
        if result.is_file():
            got = json.loads(result.read_text())
            if got["status"] == "failed":
                logger.warning("%s, %s:\n%s", workload.name, contestant.label, ended.said.strip())
            return {**got, "process_seconds": took}
        if ended.code is None:
            why = f"not finished in {seconds:.0f} s"
            return {"status": "not finished", "why": why, "process_seconds": took}
        last = next((line for line in reversed(ended.said.splitlines()) if line.strip()), "no message")
        why = f"the process ended with {ended.code}: {last[:240]}"
        return {"status": "failed", "why": why, "process_seconds": took}


def _stem(of: Workload | Contestant) -> str:
    """A file name's part."""
    name = f"{of.family}-{of.variant}-{of.size[0]}" if isinstance(of, Workload) else of.label
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """A terminated bench ends like an interrupted one, so that no process of its stays behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
