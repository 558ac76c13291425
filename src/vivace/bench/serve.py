"""Serving under load: our engine beside the two obvious servers, each a lock around one pipeline.

python -m vivace.bench.serve sd:1.5 --concurrency 1,4,16 --pictures 64 --steps 15-25
python -m vivace.bench.serve builtin
python -m vivace.bench.serve --url http://127.0.0.1:8000 --size 256x256
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vivace.families import FAMILIES
from vivace.serve.load import Ask, Measured, locked, put, requests, served

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
    concurrency: tuple[int, ...]
    preset: str


def bench(pipe: Any, load: Load) -> Iterator[dict[str, Any]]:
    """The measurements of every server at every concurrency, one after the other, as lines for JSON."""
    asked = requests(load.pictures, prompt=PROMPT, size=load.size, steps=load.steps, seed=0)
    with contestant("stock, one lock", pipe, load, concurrency=1) as (ask, _):
        ask(asked[0])
        exact = [ask(request) for request in asked[:COMPARED]]
        again = [_twice(pipe, request)[1] for request in asked[:COMPARED]]
    floor = distance(exact, again)
    for concurrency in load.concurrency:
        for name in ("stock, one lock", f"{load.preset}, one lock", f"{load.preset}, our engine"):
            began = time.perf_counter()
            with contestant(name, pipe, load, concurrency=concurrency) as (ask, busy):
                ask(asked[0])
                cold = time.perf_counter() - began
                if name.endswith("engine"):
                    # Every batch size that the load can bring is met before it counts.
                    put(ask, asked[: 2 * concurrency], concurrency=concurrency, server=name)
                busy.clear()
                _reset_peak()
                kept: dict[int | None, Any] = {}
                these = asked[: max(LEAST, 2 * concurrency)]
                spent = time.process_time()
                found = put(ask, these, concurrency=concurrency, server=name, stagger=STAGGER, kept=kept)
                spent = (time.process_time() - spent) / found.pictures
                # By seed: one that failed is in nobody's comparison.
                pairs = [(picture, kept[n]) for n, picture in enumerate(exact) if n in kept]
                line = _line(found, cold=cold, floor=floor, apart=distance(*zip(*pairs, strict=True)), busy=busy)
                yield line | {"cpu_s_per_image": round(spent, 4)}


@contextmanager
def contestant(name: str, pipe: Any, load: Load, *, concurrency: int) -> Iterator[tuple[Ask, list[tuple[int, float]]]]:
    """A server by name, and where it notes the size and seconds of its calls, if it does."""
    from vivace.accelerate import accelerate, restore

    busy: list[tuple[int, float]] = []
    try:
        if name.endswith("engine"):
            with served(pipe, preset=load.preset, concurrency=concurrency, busy=busy) as ask:
                yield ask, busy
        else:
            if not name.startswith("stock"):
                accelerate(pipe, load.preset)
            yield locked(pipe), busy
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


def _line(
    found: Measured, *, cold: float, floor: float, apart: float, busy: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    import torch

    line = asdict(found) | {"cold_s": round(cold, 2), "from_stock": apart, "noise_floor": floor}
    if busy:
        line["device_busy"] = round(sum(seconds for _, seconds in busy) / found.seconds, 3)
        line["requests_per_call"] = round(sum(size for size, _ in busy) / len(busy), 2)
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
    on_line: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> Path:
    """Put the load on the three servers of a model; the file with the results. Raises InputError."""
    from vivace.load import resolve_device, resolve_dtype
    from vivace.machine import machine

    place = resolve_device(device)
    number = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    pipe, usual = pipeline_of(model, device=str(place), dtype=number, tiny=tiny)
    pipe.set_progress_bar_config(disable=True)
    load = Load(
        title=model,
        size=size or usual,
        steps=steps,
        pictures=pictures,
        concurrency=tuple(concurrency),
        preset=preset,
    )
    name = "".join(c if c.isalnum() else "-" for c in model)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-serve-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "machine": machine(), "device": str(place), "dtype": number, "load": asdict(load)}
    lines = []
    for line in bench(pipe, load):
        lines.append(line)
        on_line(line)
        # At once: what was measured so far is kept when somebody ends it.
        path.write_text(json.dumps(facts | {"results": lines}, indent=1))
        path.with_suffix(".md").write_text(f"{table(lines)}\n")
    return path
