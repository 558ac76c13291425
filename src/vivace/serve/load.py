"""A load: clients that each ask, wait for the picture and ask again; and the servers that it is put on."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.serve.request import Request

if TYPE_CHECKING:
    from vivace.serve.engine import Engine

Ask = Callable[[Request], Any]
"""Makes one picture, and returns when it is there."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one server did under one load."""

    server: str
    concurrency: int
    pictures: int
    seconds: float
    images_per_second: float
    p50_s: float
    p95_s: float
    failed: int


def requests(count: int, *, prompt: str, size: tuple[int, int], steps: tuple[int, int], seed: int) -> list[Request]:
    """The same mixed requests for every server: steps are drawn from the range `steps`, ends included."""
    chance = random.Random(seed)
    return [
        Request(prompt=f"{prompt}, number {number}", size=size, steps=chance.randint(*steps), seed=number)
        for number in range(count)
    ]


def put(
    ask: Ask,
    asked: Sequence[Request],
    *,
    concurrency: int,
    server: str,
    stagger: float = 0.0,
    kept: dict[int | None, Any] | None = None,
) -> Measured:
    """Have `concurrency` clients work through `asked` in order, each with one request at a time (a closed loop).

    The clients begin within `stagger` seconds, each at a time drawn for it. Seconds are of the wall clock from the
    first request to the last answer; latencies are what a client waits. Answers go to `kept`, by seed.
    """
    left = iter(asked)
    lock = threading.Lock()
    latencies: list[float] = []
    failed: list[BaseException] = []
    chance = random.Random(0)
    drawn = sorted(chance.uniform(0, stagger) for _ in range(concurrency))
    starts = [one - drawn[0] for one in drawn]

    def client(wait: float) -> None:
        time.sleep(wait)
        while True:
            with lock:
                request = next(left, None)
            if request is None:
                return
            began = time.perf_counter()
            try:
                answer = ask(request)
            except Exception as error:
                failed.append(error)
            else:
                latencies.append(time.perf_counter() - began)
                if kept is not None:
                    kept[request.seed] = answer

    threads = [threading.Thread(target=client, args=(wait,)) for wait in starts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if not latencies:
        raise failed[0]
    return Measured(
        server=server,
        concurrency=concurrency,
        pictures=len(latencies),
        seconds=round(seconds, 3),
        images_per_second=round(len(latencies) / seconds, 4),
        p50_s=round(statistics.median(latencies), 4),
        p95_s=round(sorted(latencies)[min(len(latencies) - 1, int(0.95 * len(latencies)))], 4),
        failed=len(failed),
    )


def locked(pipe: Any) -> Ask:
    """The obvious server: one pipeline, one lock, one request after the other."""
    import torch

    lock = threading.Lock()

    def ask(request: Request) -> Any:
        assert request.size is not None
        width, height = request.size
        generator = torch.Generator("cpu").manual_seed(request.seed or 0)
        steps = {"num_inference_steps": request.steps, "width": width, "height": height}
        with lock:
            return pipe(request.prompt, **steps, generator=generator, output_type="pil").images[0]

    return ask


@contextmanager
def served(pipe: Any, *, preset: str, concurrency: int) -> Iterator[Engine]:
    """Our engine over the same pipeline; `asking` asks it."""
    from vivace.serve.engine import Engine
    from vivace.serve.model import Spec

    with Engine(models={"model": Spec(source=pipe, preset=preset)}, threads=concurrency) as engine:
        yield engine


def asking(engine: Engine) -> Ask:
    """What asks an engine."""
    return lambda request: engine.submit(request).result().pictures[0]
