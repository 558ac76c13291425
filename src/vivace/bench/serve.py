"""Serving under load: our engine beside the two obvious servers, each a lock around one pipeline.

vivace bench --serve sd:1.5 --concurrency 1,4,16 --pictures 64 --steps 20
vivace bench --serve builtin --profile
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.bench.interpreter import Interpreter, tabulate
from vivace.families import FAMILIES
from vivace.serve.load import Ask, Measured, asking, locked, put, requests, served

if TYPE_CHECKING:
    from vivace.serve.engine import Engine
    from vivace.serve.request import Request
    from vivace.serve.worker import Batch

PROMPT = "a small red star above a blue ring"
COMPARED = 4  # pictures whose distance from the stock ones is measured
STAGGER = 0.5  # seconds within which the clients begin
LEAST = 8  # pictures at any concurrency; beyond that, two for each client


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, of every server the same."""

    title: str
    size: tuple[int, int]
    steps: tuple[int, int]
    pictures: int
    preset: str

    @property
    def servers(self) -> tuple[str, str, str]:
        """The contestants: the two obvious ones, then ours."""
        return ("stock, one lock", f"{self.preset}, one lock", f"{self.preset}, our engine")

    @property
    def requests(self) -> list[Request]:
        return requests(self.pictures, prompt=PROMPT, size=self.size, steps=self.steps, seed=0)


@dataclass(kw_only=True)
class Server:
    """A contestant that is up."""

    ask: Ask
    engine: Engine | None = None  # ours
    calls: list[Batch] = field(default_factory=list)  # of ours


def bench(
    pipe: Any, load: Load, turns: Sequence[tuple[int, str]], *, profile: bool = False
) -> Iterator[dict[str, Any]]:
    """The measurements of these turns, a number of clients and a server each, as lines for JSON."""
    asked = load.requests
    with contestant(load.servers[0], pipe, load, concurrency=1) as server:
        server.ask(asked[0])
        exact = [server.ask(request) for request in asked[:COMPARED]]
        again = [_twice(pipe, request)[1] for request in asked[:COMPARED]]
    floor = distance(exact, again)
    for concurrency, name in turns:
        began = time.perf_counter()
        with contestant(name, pipe, load, concurrency=concurrency) as server:
            server.ask(asked[0])
            cold = time.perf_counter() - began
            if server.engine is not None:
                # Every batch size that the load can bring is met before it counts.
                put(server.ask, asked[: 2 * concurrency], concurrency=concurrency, server=name)
            server.calls.clear()
            _reset_peak()
            kept: dict[int | None, Any] = {}
            looking = Interpreter(server.engine) if profile and server.engine is not None else None
            these, spent = asked[: max(LEAST, 2 * concurrency)], time.process_time()
            found = put(server.ask, these, concurrency=concurrency, server=name, stagger=STAGGER, kept=kept)
            line = _line(found, calls=server.calls) | {
                "cpu_s_per_image": round((time.process_time() - spent) / found.pictures, 4),
                "cold_s": round(cold, 2),
                # By seed: one that failed is in nobody's comparison.
                "from_stock": distance(
                    *zip(*((one, kept[n]) for n, one in enumerate(exact) if n in kept), strict=True)
                ),
                "noise_floor": floor,
            }
            if looking is not None:
                line["profile"] = looking.stop(server.calls, pictures=found.pictures)
            yield line


@contextmanager
def contestant(name: str, pipe: Any, load: Load, *, concurrency: int) -> Iterator[Server]:
    """A server by name; at its end the pipeline is as it was."""
    from vivace.accelerate import accelerate, restore

    try:
        if name == load.servers[-1]:
            with served(pipe, preset=load.preset, concurrency=concurrency) as engine:
                server = Server(ask=asking(engine), engine=engine)
                engine.observe(batch=server.calls.append, job=lambda job: None)
                yield server
        else:
            if name != load.servers[0]:
                accelerate(pipe, load.preset)
            yield Server(ask=locked(pipe))
    finally:
        restore(pipe)


def distance(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Mean absolute difference of pictures, in grey levels of 255."""
    import torch

    def values(picture: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float()

    apart = [(values(a) - values(b)).abs().mean() for a, b in zip(ours, theirs, strict=True)]
    return round(float(torch.stack(apart).mean()), 4)


def _twice(pipe: Any, request: Any) -> list[Any]:
    """The same picture twice in one call: the same maths in another order, which is the noise floor."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(request.seed) for _ in range(2)]
    width, height = request.size
    shape = {"num_inference_steps": request.steps, "width": width, "height": height}
    return pipe([request.prompt] * 2, **shape, generator=generators, output_type="pil").images


def _line(found: Measured, *, calls: Sequence[Batch]) -> dict[str, Any]:
    import torch

    line = asdict(found)
    if calls:
        line["device_busy"] = round(sum(call.seconds for call in calls) / found.seconds, 3)
        line["requests_per_call"] = round(sum(call.size for call in calls) / len(calls), 2)
    if torch.cuda.is_available():
        line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return line


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The measurements to read, each beside the two obvious servers."""
    columns = ("concurrency", "server", "images/s", "x stock", "x ours locked", "p50 s", "p95 s", "from stock", "floor")
    rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for line in lines:
        peers = [one for one in lines if one["concurrency"] == line["concurrency"]]
        rates = [one["images_per_second"] for one in peers]
        over = [f"{line['images_per_second'] / rate:.2f}" for rate in (rates[0], rates[min(1, len(rates) - 1)])]
        times = [f"{line[name]:.2f}" for name in ("images_per_second", "p50_s", "p95_s")]
        quality = [f"{line.get(name, float('nan')):.3f}" for name in ("from_stock", "noise_floor")]
        cells = [str(line["concurrency"]), line["server"], times[0], *over, *times[1:], *quality]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def pipeline_of(name: str, *, device: str, dtype: str, tiny: bool = False) -> tuple[Any, tuple[int, int]]:
    """A pipeline and its usual size: `FAMILY[:variant]` at true size with random weights, or what `load` takes."""
    from vivace.bench.subject import build
    from vivace.bench.workload import workload_of
    from vivace.load import find, load

    if name.partition(":")[0] not in FAMILIES:
        return load(name, device=device, dtype=dtype), find(name).size or (512, 512)
    workload = workload_of(name, device=device, dtype=dtype, tiny=tiny, end_to_end=True)
    return build(workload), workload.size


def run(
    model: str,
    *,
    folder: Path,
    command: str,
    concurrency: Sequence[int] = (1, 4, 16),
    pictures: int = 64,
    steps: tuple[int, int] = (15, 25),
    size: tuple[int, int] | None = None,
    preset: str = "exact",
    device: str | None = None,
    dtype: str | None = None,
    tiny: bool = False,
    profile: bool = False,
    again: bool = False,
    budget: float | None = None,
    on_line: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> tuple[Path, int]:
    """Put the load on the three servers of a model; the file with the results, and the turns left for the next time.

    What the file has already is not measured again, and after `budget` seconds no further turn is begun. Raises
    InputError.
    """
    from vivace.load import resolve_device, resolve_dtype
    from vivace.machine import machine

    began, place = time.monotonic(), resolve_device(device)
    number = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    pipe, usual = pipeline_of(model, device=str(place), dtype=number, tiny=tiny)
    pipe.set_progress_bar_config(disable=True)
    load = Load(title=model, size=size or usual, steps=steps, pictures=pictures, preset=preset)
    facts = {"machine": machine(), "device": str(place), "dtype": number, "tiny": tiny, "load": asdict(load)}
    path, lines = _begun(folder, "".join(c if c.isalnum() else "-" for c in model), facts)
    turns = list(itertools.product(concurrency, load.servers))
    lines = [] if again else [one for one in lines if not (profile and _turn(one) in turns and _unprofiled(one, load))]
    left = [turn for turn in turns if turn not in map(_turn, lines)]
    for line in bench(pipe, load, tuple(left), profile=profile) if left else ():
        lines = sorted([*lines, line], key=lambda one: (one["concurrency"], load.servers.index(one["server"])))
        left.remove(_turn(line))
        on_line(line)
        # At once: what was measured so far is kept when somebody ends it.
        path.write_text(json.dumps({"command": command, **facts, "results": lines}, indent=1))
        path.with_suffix(".md").write_text(f"{table(lines)}\n{tabulate(lines)}")
        if budget is not None and time.monotonic() - began > budget:
            break
    return path, len(left)


def _begun(folder: Path, name: str, facts: Mapping[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    """The file of this load and what it has: one that was begun on this machine, or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(facts))
    for path in sorted(folder.glob(f"*-serve-{name}*.json")):
        found = json.loads(path.read_text())
        if all(found.get(key) == value for key, value in plain.items()):
            return path, found["results"]
    stem = f"{datetime.now(UTC):%Y-%m-%d}-serve-{name}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}.json").exists()), []


def _turn(line: Mapping[str, Any]) -> tuple[int, str]:
    return line["concurrency"], line["server"]


def _unprofiled(line: Mapping[str, Any], load: Load) -> bool:
    return line["server"] == load.servers[-1] and "profile" not in line
