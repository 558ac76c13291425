"""Serving on Ray under load: one replica beside the plain server, two beside one, and replicas killed meanwhile."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from vivace.bench.serve import PROMPT, distance
from vivace.bench.table import markdown_table
from vivace.errors import InputError
from vivace.serve.load import put, requests
from vivace.serve.request import Request

PLAIN, ONE, TWO = "plain server", "Ray, one replica", "Ray, two replicas"
ROUNDS = 3  # in each of which every server has one turn; the median counts
PATIENCE = 300.0  # seconds after which a request counts as hung
KILLS = (0.25, 0.5)  # shares of the answers after which a replica is killed


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, of every server the same."""

    model: str
    size: tuple[int, int] | None
    steps: tuple[int, int]
    pictures: int
    concurrency: int

    @property
    def requests(self) -> list[Request]:
        size = self.size or (256, 256)
        return requests(self.pictures, prompt=PROMPT, size=size, steps=self.steps, seed=0)


class Refused(Exception):
    """An answer other than a picture, or none."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def asker(url: str) -> Callable[[Request], Any]:
    """Asks a server for a picture, and returns it. Raises Refused."""
    from PIL import Image

    def ask(request: Request) -> Any:
        assert request.size is not None
        fields = {"prompt": request.prompt, "steps": request.steps, "seed": request.seed, "model": "model"}
        body = json.dumps(fields | {"size": f"{request.size[0]}x{request.size[1]}"}).encode()
        wanted = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(wanted, timeout=PATIENCE) as answer:
                entry = json.load(answer)["data"][0]
        except urllib.error.HTTPError as error:
            again = " with Retry-After" if error.headers.get("Retry-After") else ""
            raise Refused(f"{error.code}{again}") from None
        except TimeoutError:
            raise Refused("hung") from None
        except OSError as error:
            raise Refused(f"no answer: {type(error).__name__}") from None
        return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))

    return ask


@dataclass(frozen=True, kw_only=True)
class Up:
    """A contestant that answers. `door` is what knows of Ray's replicas."""

    url: str
    cold_s: float  # from its command to its first picture
    door: Any = None


@contextmanager
def plain(load: Load) -> Iterator[tuple[str, Any]]:
    """The plain server in a process of its own, ready; its address."""
    port = _port()
    # As a user starts it: with all the threads it likes.
    mine = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "vivace", "serve", f"model={load.model}", "--port", str(port)]
    process = subprocess.Popen(command, env=mine, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _ready(url):
            if process.poll() is not None:
                raise InputError(f"the server of {load.model} ended with {process.returncode}; try: vivace serve")
            time.sleep(0.2)
        yield url, None
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def on_ray(load: Load, *, replicas: int) -> Iterator[tuple[str, Any]]:
    """Replicas that share the machine evenly on a cluster of their own, ready; the address and the door's handle."""
    from vivace.cluster.connect import connect
    from vivace.serve.cluster.run import serving
    from vivace.serve.plan import Plan

    port, cores = _port(), os.cpu_count() or 1
    plan = Plan(
        models={"model": load.model}, replicas=replicas, cpus=max(1, cores // replicas), max_queue=4 * load.pictures,
        drain_seconds=5,
    )  # fmt: skip
    with connect(), serving(plan, api_key=None, port=port) as door:
        url = f"http://127.0.0.1:{port}"
        while not _ready(url):
            time.sleep(0.2)
        yield url, door


CONTESTANTS = {PLAIN: plain, ONE: partial(on_ray, replicas=1), TWO: partial(on_ray, replicas=2)}


@contextmanager
def up(name: str, load: Load) -> Iterator[Up]:
    """A contestant by name, from its command to the end of its processes."""
    began = time.perf_counter()
    with CONTESTANTS[name](load) as (url, door):
        asker(url)(load.requests[0])
        yield Up(url=url, cold_s=round(time.perf_counter() - began, 2), door=door)


def measure(server: Up, load: Load, *, name: str) -> tuple[dict[str, Any], dict[int | None, Any]]:
    """One turn: the load once, after a warm-up, as a line for JSON, and the pictures by seed."""
    asked, ask = load.requests, asker(server.url)
    put(ask, asked[: 2 * load.concurrency], concurrency=load.concurrency, server=name)
    kept: dict[int | None, Any] = {}
    line = asdict(put(ask, asked, concurrency=load.concurrency, server=name, kept=kept))
    return line | {"cold_s": server.cold_s, "memory_gib": memory()}, kept


def memory() -> float:
    """GiB that a server and all it started hold: this process's children and theirs, shared pages counted once."""
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one may have ended meanwhile
            found = child.memory_full_info()
            total += getattr(found, "pss", found.rss)
    return round(total / 2**30, 2)


def break_replicas(url: str, door: Any, load: Load) -> dict[str, Any]:
    """The load while replicas are killed: how many requests were answered, sent again, refused, hung."""
    asked, ask, outcomes, killed = load.requests, asker(url), Counter[str](), []
    before, began = door.facts.remote().result()["retried"], time.perf_counter()
    lock, over, slowest = threading.Lock(), threading.Event(), 0.0

    def counted(request: Request) -> Any:
        nonlocal slowest
        started = time.perf_counter()
        try:
            picture, what = ask(request), "answered"
        except Refused as error:
            picture, what = None, error.what
        with lock:
            outcomes[what] += 1
            slowest = max(slowest, time.perf_counter() - started)
        return picture

    def kill() -> None:
        for share in KILLS:
            while outcomes.total() < share * len(asked) or not (drawing := door.facts.remote().result()["drawing"]):
                if over.wait(0.05):
                    return
            os.kill(drawing[0], signal.SIGKILL)
            killed.append(round(time.perf_counter() - began, 2))

    killer = threading.Thread(target=kill)
    killer.start()
    put(counted, asked, concurrency=load.concurrency, server=TWO)
    over.set()
    killer.join()
    return {
        "asked": len(asked),
        "answered": outcomes["answered"],
        "sent_again": door.facts.remote().result()["retried"] - before,
        "refused_503_with_retry_after": outcomes["503 with Retry-After"],
        "hung": outcomes["hung"],
        "other": {what: n for what, n in outcomes.items() if what not in ("answered", "503 with Retry-After", "hung")},
        "killed_at_s": killed,
        "slowest_s": round(slowest, 2),
        "seconds": round(time.perf_counter() - began, 2),
    }


def run(
    model: str,
    *,
    folder: Path,
    command: str,
    concurrency: int = 4,
    pictures: int = 24,
    steps: tuple[int, int] = (15, 25),
    size: tuple[int, int] | None = None,
    on_line: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> Path:
    """Put the load on the three servers in turns, and last kill replicas under it; the file with the results.

    Every turn is from a cold start, and in every round each server has one: what else the machine does meets all
    alike. The file is written after each.
    """
    from vivace.machine import machine

    os.environ.pop("OMP_NUM_THREADS", None)  # Ray gives every replica as many threads as it has processors
    load = Load(model=model, size=size, steps=steps, pictures=pictures, concurrency=concurrency)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-serve-ray-{''.join(c if c.isalnum() else '-' for c in model)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "machine": machine(), "load": asdict(load)}
    turns: list[dict[str, Any]] = []
    exact: dict[int | None, Any] = {}
    fault: dict[str, Any] = {}
    for number in range(ROUNDS):
        for name in CONTESTANTS:
            with up(name, load) as server:
                line, kept = measure(server, load, name=name)
                exact = exact or kept
                turns.append(line | {"round": number + 1, "from_plain": apart(kept, exact)})
                on_line(turns[-1])
                write(path, facts, turns)
                if name == TWO and number == ROUNDS - 1:
                    fault = break_replicas(server.url, server.door, load)
    write(path, facts, turns, fault)
    return path


def apart(ours: Mapping[int | None, Any], exact: Mapping[int | None, Any]) -> float | None:
    """The distance of the pictures that both have, by seed: a request that failed has none. None without any."""
    both = [seed for seed in exact if seed in ours]
    return distance([ours[seed] for seed in both], [exact[seed] for seed in both]) if both else None


def write(
    path: Path, facts: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], fault: Mapping[str, Any] | None = None
) -> None:
    """All that was measured so far: each turn, each server's median, and the table once every server had its turn."""
    results = medians(turns)
    whole = len(results) == len(CONTESTANTS)
    found = {"ratios": ratios(results)} if whole else {}
    path.write_text(json.dumps({**facts, **found, "results": results, "turns": list(turns), "fault": fault}, indent=1))
    if whole:
        path.with_suffix(".md").write_text(table(results, fault or {}))


def medians(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a server: its turn with the median rate, all rates, and its worst memory, distance and failures."""
    lines = []
    for name in dict.fromkeys(turn["server"] for turn in turns):
        mine = [turn for turn in turns if turn["server"] == name]
        rates = [turn["images_per_second"] for turn in mine]
        line = dict(mine[rates.index(statistics.median_low(rates))])
        line.pop("round")
        distances = [turn["from_plain"] for turn in mine if turn["from_plain"] is not None]
        line |= {
            "rounds": rates,
            "failed": sum(turn["failed"] for turn in mine),
            "cold_s": statistics.median_low(turn["cold_s"] for turn in mine),
            "memory_gib": max(turn["memory_gib"] for turn in mine),
            "from_plain": max(distances, default=None),
        }
        lines.append(line)
    return lines


def ratios(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What Ray costs through one replica, as a share of the plain server's time, and two replicas over one."""
    rates = {line["server"]: line["images_per_second"] for line in lines}
    return {"overhead": round(rates[PLAIN] / rates[ONE] - 1, 4), "two_over_one": round(rates[TWO] / rates[ONE], 4)}


def table(lines: Sequence[Mapping[str, Any]], fault: Mapping[str, Any]) -> str:
    """The measurements to read."""
    columns = ("server", "images/s", "rounds", "p50 s", "p95 s", "failed", "from plain", "cold s", "memory GiB")
    rows = [
        [line["server"], f"{line['images_per_second']:.2f}", " ".join(f"{rate:.2f}" for rate in line["rounds"]),
         f"{line['p50_s']:.2f}", f"{line['p95_s']:.2f}", str(line["failed"]),
         "-" if line["from_plain"] is None else f"{line['from_plain']:.3f}", f"{line['cold_s']:.1f}",
         f"{line['memory_gib']:.1f}"]
        for line in lines
    ]  # fmt: skip
    found = ratios(lines)
    told = f"Overhead of Ray {found['overhead']:.1%}; two replicas {found['two_over_one']:.2f} times one."
    killed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fault.items())
    broken = f"\nReplicas killed under load: {killed}.\n" if fault else ""
    return f"{markdown_table(columns, rows)}\n\n{told}\n{broken}"


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False
