"""Serving on Ray under load: one replica beside the plain server, two beside one, and replicas killed meanwhile."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vivace.bench.child import Child, free_port, serving, until_ready
from vivace.bench.rounds import ROUNDS, Line, asked, times
from vivace.bench.serve import distance
from vivace.bench.table import markdown_table
from vivace.serve.load import against, pooled, put, rotated
from vivace.serve.request import Request

PLAIN, ONE, TWO = "plain server", "Ray, one replica", "Ray, two replicas"
SERVERS = (PLAIN, ONE, TWO)
PATIENCE = 300.0  # seconds after which a request counts as hung
KILLS = (0.25, 0.5)  # shares of the answers after which a replica is killed


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, of every server the same."""

    model: str
    size: tuple[int, int] | None
    steps: tuple[int, int]
    pictures: int  # of each server, at least
    rounds: int
    concurrency: int

    def requests(self, number: int) -> list[Request]:
        """What is asked in the round of that number: pictures of its own."""
        shape = {"size": self.size or (256, 256), "steps": self.steps}
        return asked(number, of=self.rounds, clients=self.concurrency, pictures=self.pictures, **shape)

    def facts(self) -> dict[str, Any]:
        """The load for JSON, with how many pictures it comes to: a round has a least number of each client's."""
        each = len(self.requests(0))
        return asdict(self) | {"pictures_a_round": each, "pictures_a_server": each * self.rounds}


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


def options(name: str, load: Load) -> list[str]:
    """What `vivace serve` is given for a contestant; replicas share the machine evenly."""
    plain = [f"model={load.model}", "--max-queue", str(4 * load.pictures), "--drain", "5"]
    replicas = {PLAIN: 0, ONE: 1, TWO: 2}[name]
    cpus = max(1, (os.cpu_count() or 1) // max(1, replicas))
    return [*plain, "--ray", "--replicas", str(replicas), "--cpus", str(cpus)] if replicas else plain


@contextmanager
def up(load: Load) -> Iterator[dict[str, Child]]:
    """The contestants, started one after the other; each has drawn pictures that do not count, and stands still."""
    first, found = load.requests(load.rounds), {}
    with ExitStack() as ends:
        for name in SERVERS:
            began = time.perf_counter()
            found[name] = child = ends.enter_context(serving(options(name, load)))
            asker(child.url)(first[0])
            child.cold_s = round(time.perf_counter() - began, 2)
            put(asker(child.url), first[: 2 * load.concurrency], concurrency=load.concurrency, server=name)
            child.stop()
        yield found


def one_round(servers: Mapping[str, Child], load: Load, *, number: int) -> list[Line]:
    """Each server asked for the same pictures, in the order of this round, as lines for JSON."""
    lines, kept = [], {}
    for name in rotated(SERVERS, number=number):
        server, kept[name] = servers[name], {}
        with server.awake():
            found = put(
                asker(server.url), load.requests(number), concurrency=load.concurrency, server=name, kept=kept[name]
            )
            lines.append({"round": number, **asdict(found), "cold_s": server.cold_s, "memory_gib": server.memory()})
    return [{**line, "from_plain": apart(kept[line["server"]], kept[PLAIN])} for line in lines]


def break_replicas(url: str, door: Any, load: Load) -> dict[str, Any]:
    """A round while replicas are killed: how many requests were answered, sent again, refused, hung."""
    asked, ask, outcomes, killed = load.requests(0), asker(url), Counter[str](), []
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


@contextmanager
def on_ray(load: Load) -> Iterator[tuple[str, Any]]:
    """Two replicas on a cluster of this process's own, ready; the address, and the door, which knows its replicas."""
    from vivace.cluster.connect import connect
    from vivace.serve.cluster.run import serving as serving_on_ray
    from vivace.serve.plan import Plan

    os.environ.pop("OMP_NUM_THREADS", None)  # Ray gives every replica as many threads as it has processors
    port, cpus = free_port(), max(1, (os.cpu_count() or 1) // 2)
    plan = Plan(models={"model": load.model}, replicas=2, cpus=cpus, max_queue=4 * load.pictures, drain_seconds=5)
    with connect(), serving_on_ray(plan, api_key=None, port=port) as door:
        until_ready(url := f"http://127.0.0.1:{port}")
        yield url, door


def run(
    model: str,
    *,
    folder: Path,
    command: str,
    concurrency: int = 4,
    pictures: int = 24,
    rounds: int = ROUNDS,
    steps: tuple[int, int] = (15, 25),
    size: tuple[int, int] | None = None,
    on_line: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> Path:
    """Put the load on the three servers in turns, and last kill replicas under it; the file with the results.

    All three are up the whole time; who is not asked stands still. The file is written after each round.
    """
    from vivace.machine import machine

    load = Load(model=model, size=size, steps=steps, pictures=pictures, rounds=rounds, concurrency=concurrency)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-serve-ray-{''.join(c if c.isalnum() else '-' for c in model)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "machine": machine(), "load": load.facts()}
    measured: list[Line] = []
    with up(load) as servers:
        for number in range(rounds):
            lines = one_round(servers, load, number=number)
            measured += lines
            write(path, facts, measured)
            for line in lines:
                on_line(line)
    with on_ray(load) as (url, door):
        write(path, facts, measured, break_replicas(url, door, load))
    return path


def apart(ours: Mapping[int | None, Any], exact: Mapping[int | None, Any]) -> float | None:
    """The distance of the pictures that both have, by seed: a request that failed has none. None without any."""
    both = [seed for seed in exact if seed in ours]
    return distance([ours[seed] for seed in both], [exact[seed] for seed in both]) if both else None


def write(path: Path, facts: Mapping[str, Any], rounds: Sequence[Line], fault: Mapping[str, Any] | None = None) -> None:
    """All that was measured so far: each round, each server's as one, and the table."""
    of = {name: [one for one in rounds if one["server"] == name] for name in SERVERS}
    results = [pooled(mine) | _worst(mine) for mine in of.values()]
    overhead, two = against(of[PLAIN], of[ONE]), against(of[TWO], of[ONE])
    found = {"overhead": round(overhead[0] - 1, 4), "two_over_one": two[0]}
    found |= {"overhead_error": overhead[1], "two_over_one_error": two[1]}
    written = {**facts, "ratios": found, "results": results, "fault": fault, "rounds": list(rounds)}
    path.write_text(json.dumps(written, indent=1))
    path.with_suffix(".md").write_text(table(results, found, fault or {}))


def _worst(rounds: Sequence[Line]) -> dict[str, Any]:
    """The most memory and the largest distance of any round."""
    distances = [one["from_plain"] for one in rounds if one["from_plain"] is not None]
    return {
        "cold_s": rounds[0]["cold_s"],
        "memory_gib": max(one["memory_gib"] for one in rounds),
        "from_plain": max(distances, default=None),
    }


def table(lines: Sequence[Line], found: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    """The measurements to read. ± is the standard error, from round to round."""
    columns = ("server", "images/s", "p50 s", "p95 s", "failed", "from plain", "cold s", "memory GiB")
    rows = [
        [line["server"], f"{line['images_per_second']:.2f}", f"{line['p50_s']:.2f}", f"{line['p95_s']:.2f}",
         str(line["failed"]), "-" if line["from_plain"] is None else f"{line['from_plain']:.3f}",
         f"{line['cold_s']:.1f}", f"{line['memory_gib']:.1f}"]
        for line in lines
    ]  # fmt: skip
    error = found["overhead_error"]
    percent = f"{found['overhead']:.1%}" + (f" ± {error:.1%}" if error else "")
    two = times(found["two_over_one"], found["two_over_one_error"])
    load = f"{lines[0]['pictures']} pictures of each server, in {lines[0]['rounds']} rounds."
    told = f"{load} Overhead of Ray {percent}; two replicas {two} times one."
    killed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fault.items())
    broken = f"\nReplicas killed under load: {killed}.\n" if fault else ""
    return f"{markdown_table(columns, rows)}\n\n{told}\n{broken}"
