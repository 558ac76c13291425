"""Serving under load: our engine beside the two obvious servers, each a lock around one pipeline.

python -m vivace.bench.serve sd:1.5 --concurrency 1,4,16 --pictures 64 --steps 15-25
python -m vivace.bench.serve builtin
python -m vivace.bench.serve --url http://127.0.0.1:8000 --size 256x256
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.serve.load import Ask, Measured, locked, over_http, put, requests, served

PROMPT = "a small red star above a blue ring"
COMPARED = 4  # pictures whose distance from the stock ones is measured
STAGGER = 0.5  # seconds within which the clients begin


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
                # Every batch size that the load can bring is met once before it counts.
                put(ask, asked[: 2 * concurrency], concurrency=concurrency, server=name)
                busy.clear()
                _reset_peak()
                kept: dict[int | None, Any] = {}
                found = put(ask, asked, concurrency=concurrency, server=name, stagger=STAGGER, kept=kept)
                pictures = [kept[request.seed] for request in asked[:COMPARED]]
                yield _line(found, cold=cold, floor=floor, apart=distance(exact, pictures), busy=busy)


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


def random_pipeline(name: str, *, device: str, dtype: str) -> Any:
    """A pipeline of `FAMILY[:variant]` at true size with random weights; its tokenizers are the tiny pipeline's."""
    import diffusers
    import torch

    family_name, _, variant_name = name.partition(":")
    if family_name not in FAMILIES:
        raise InputError(f"unknown family {family_name!r}; vivace knows {', '.join(FAMILIES)}")
    family = FAMILIES[family_name]
    variant = family.variant(variant_name or None)
    small = family.tiny(variant.pipeline)
    parts = dict(small.components)
    for slot in {*family.denoisers, "vae", *family.text_encoders, *variant.text_encoders} & parts.keys():
        if parts[slot] is not None:
            number = getattr(torch, dtype)
            parts[slot] = family.full(variant_name or None, component=slot, device=device, dtype=number)
    kind, config = family.scheduler
    if kind:
        parts["scheduler"] = getattr(diffusers, kind)(**{**config, **variant.scheduler})
    return type(small)(**parts)


def main(arguments: Sequence[str] | None = None) -> Path:
    """The command line; returns the file it wrote."""
    from vivace.cli.generate import read_size
    from vivace.load import find, load, resolve_device, resolve_dtype
    from vivace.machine import machine

    options = _options(arguments)
    device = resolve_device(options.device)
    dtype = str(resolve_dtype(options.dtype, device)).removeprefix("torch.")
    model, size, pipe = options.model, (256, 256), None
    if options.url is None and model.partition(":")[0] in FAMILIES:
        variant = FAMILIES[model.partition(":")[0]].variant(model.partition(":")[2] or None)
        size, pipe = variant.size, random_pipeline(model, device=str(device), dtype=dtype)
    elif options.url is None:
        size, pipe = find(model).size or size, load(model, device=device, dtype=dtype)
    low, _, high = options.steps.partition("-")
    wanted = Load(
        title=options.url or model,
        size=read_size(options.size) if options.size else size,
        steps=(int(low), int(high or low)),
        pictures=options.pictures,
        concurrency=tuple(int(part) for part in options.concurrency.split(",")),
        preset=options.preset,
    )
    if pipe is not None:
        pipe.set_progress_bar_config(disable=True)
    lines = []
    for line in bench(pipe, wanted) if pipe is not None else _elsewhere(str(options.url), wanted):
        lines.append(line)
        sys.stderr.write(f"{json.dumps(line)}\n")
    command = shlex.join(["python", "-m", "vivace.bench.serve", *(sys.argv[1:] if arguments is None else arguments)])
    name = "".join(c if c.isalnum() else "-" for c in wanted.title)
    path = options.output / f"{datetime.now(UTC):%Y-%m-%d}-serve-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "machine": machine(), "device": str(device), "dtype": dtype, "load": asdict(wanted)}
    path.write_text(json.dumps(facts | {"results": lines}, indent=1))
    sys.stdout.write(f"{table(lines)}\n{path}\n")
    return path


def _elsewhere(url: str, load: Load) -> Iterator[dict[str, Any]]:
    asked = requests(load.pictures, prompt=PROMPT, size=load.size, steps=load.steps, seed=0)
    ask = over_http(url)
    for concurrency in load.concurrency:
        yield asdict(put(ask, asked, concurrency=concurrency, server=url, stagger=STAGGER))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vivace.bench.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="builtin", help="builtin, a model, or FAMILY[:variant] at random")
    parser.add_argument("--url", help="a server that runs already, in place of a model")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--pictures", type=int, default=64, help="of each server at each concurrency")
    parser.add_argument("--steps", default="15-25", help="a number or a range")
    parser.add_argument("--size", help="WxH; the model's own")
    parser.add_argument("--preset", default="exact")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/bench"), help="folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
