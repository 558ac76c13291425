"""Where a server's time goes besides computing: to Python, to Python's lock, to waiting for others to join.

Only one thread of a process runs Python at a time, and every operation that the worker launches needs the interpreter
again when it returns. So requests that run Python in threads of their own can slow down the one that computes, also on
another processor. Three measures, none of which needs more than Linux's own clocks:

- the state of the worker, looked at all the time: whether it computes, holds a call back for others, or has none. On a
  GPU "computing" is launching, which is Python, and waiting for the GPU: where there is none of that, Python is late;
- the worker's wall time in calls, less what it was on a processor or in line for one: it was blocked, by the lock or
  by other threads of its own maths. Waits for a GPU are left out. Calls that a lone request's own thread computes are
  the worker's here too;
- how much longer than asked a thread sleeps that does nothing else, less its time in line for a processor: what anyone
  waits for the lock.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.serve.engine import Engine
    from vivace.serve.worker import Batch

EVERY = 0.002  # seconds between two looks
ROWS = 12  # places in the code that are named
REQUESTS = "vivace-request-"  # how the engine's threads are called
WORKERS = ("vivace-cpu", "vivace-cuda", "vivace-mps")
WAITING = ("threading.py", "queue.py")  # files whose innermost frame means: it waits, it does not run


SAID = {
    "computing": "computing",
    "python": "idle for Python",
    "joining": "idle for others to join",
    "empty": "nothing to do",
    "device": "of computing: waiting for a GPU",
    "blocked": "of computing: blocked",
    "in_line": "of computing: in line for a processor",
}
"""Shares of the wall time, as the table names them."""


class Interpreter:
    """Looks at one engine until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._states: Counter[str] = Counter()
        self._places: Counter[str] = Counter()
        self._late: list[float] = []
        self._over = threading.Event()
        self._before = _threads()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._look, name="interpreter", daemon=True)
        self._thread.start()

    def stop(self, calls: Sequence[Batch], *, pictures: int) -> dict[str, Any]:
        """What was seen; `calls` are those of the worker, whose seconds are measured exactly."""
        self._over.set()
        self._thread.join()
        wall = time.perf_counter() - self._began
        computing, waited = (sum(getattr(call, name) for call in calls) for name in ("seconds", "waited"))
        spent = _spent(self._before, _threads())
        worker = spent["worker"]
        _move(spent["requests"], worker, cpu=sum(call.own_cpu for call in calls))
        idle = {name: self._states[name] for name in ("joining", "python", "empty")}
        left = max(0.0, 1 - computing / wall)
        looks = sum(idle.values()) or 1
        waits = sorted(self._late) or [0.0]
        asleep = sum(self._places.values()) or 1
        return {
            "computing": round(computing / wall, 3),
            **{name: round(left * count / looks, 3) for name, count in idle.items()},
            "device": round(waited / wall, 3),
            "blocked": round(max(0.0, computing - waited - worker["cpu"] - worker["line"]) / wall, 3),
            "in_line": round(worker["line"] / wall, 3),
            "lock_wait_ms": round(1e3 * statistics.fmean(waits), 3),
            "lock_wait_p95_ms": round(1e3 * waits[int(0.95 * (len(waits) - 1))], 3),
            "cpu_s_per_image": {name: round(one["cpu"] / pictures, 4) for name, one in spent.items()},
            "python_in": [
                {"at": place, "share": round(count / asleep, 3)} for place, count in self._places.most_common(ROWS)
            ],
        }

    def _look(self) -> None:
        line = _in_line(threading.get_native_id())
        while not self._over.is_set():
            asked = time.perf_counter()
            time.sleep(EVERY)
            slept = time.perf_counter() - asked
            before, line = line, _in_line(threading.get_native_id())
            self._late.append(max(0.0, slept - EVERY - (line - before)))
            state = self._state()
            self._states[state] += 1
            if state == "python":
                self._places.update(_running())

    def _state(self) -> str:
        workers = list(self._engine.workers.values())
        if any(worker.busy_since is not None for worker in workers):
            return "computing"
        if any(worker.waiting for worker in workers):
            return "joining"
        return "python" if self._engine.running else "empty"


def _running() -> Iterator[str]:
    """Where in the code the requests' threads are that do not wait."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if names.get(ident, "").startswith(REQUESTS) and not frame.f_code.co_filename.endswith(WAITING):
            yield _place(frame)


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"


def _threads() -> dict[int, tuple[str, float, float]]:
    """Of each thread: whose it is, its seconds on a processor and in line for one."""
    found = {}
    for thread in threading.enumerate():
        name, number = thread.name, thread.native_id
        whose = "requests" if name.startswith(REQUESTS) else "worker" if name.startswith(WORKERS) else "rest"
        if number is not None:
            found[number] = (whose, *_clocks(number))
    return found


def _spent(
    before: dict[int, tuple[str, float, float]], after: dict[int, tuple[str, float, float]]
) -> dict[str, dict[str, float]]:
    spent = {whose: {"cpu": 0.0, "line": 0.0} for whose in ("worker", "requests", "rest")}
    for number, (whose, cpu, line) in after.items():
        _, cpu_then, line_then = before.get(number, ("", 0.0, 0.0))
        spent[whose]["cpu"] += cpu - cpu_then
        spent[whose]["line"] += line - line_then
    return spent


def _move(requests: dict[str, float], worker: dict[str, float], *, cpu: float) -> None:
    """Count so many seconds of the requests' threads as the worker's; they stood in line as often as at other times."""
    share = min(1.0, cpu / requests["cpu"]) if requests["cpu"] else 0.0
    for name in requests:
        worker[name] += share * requests[name]
        requests[name] -= share * requests[name]


def _clocks(number: int) -> tuple[float, float]:
    """Seconds of a thread on a processor, and in line for one; nothing where the system does not say."""
    try:
        cpu, line, _ = Path(f"/proc/self/task/{number}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(cpu) / 1e9, int(line) / 1e9


def _in_line(number: int) -> float:
    return _clocks(number)[1]


def tabulate(profiles: Sequence[Mapping[str, Any]]) -> str:
    """What was seen, for each number of clients, to read; "" where nothing was."""
    if not profiles:
        return ""
    columns = ("concurrency", *SAID.values(), "wait for the lock, ms (p95)", "CPU s an image: worker, requests, rest")
    rows = ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for found in profiles:
        waits = f"{found['lock_wait_ms']:.2f} ({found['lock_wait_p95_ms']:.2f})"
        spent = ", ".join(f"{found['cpu_s_per_image'][whose]:.3f}" for whose in ("worker", "requests", "rest"))
        rows.append(
            f"| {found['concurrency']} | {' | '.join(f'{found[name]:.1%}' for name in SAID)} | {waits} | {spent} |"
        )
    for found in profiles:
        rows += ["", f"Python of requests while the device idled, {found['concurrency']} at a time:", ""]
        rows += [f"- {one['share']:.0%} {one['at']}" for one in found["python_in"]]
    return "\n".join(rows) + "\n"
