"""A load: clients that each ask, wait for the picture and ask again; and the servers that it is put on."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.serve.request import Request

if TYPE_CHECKING:
    from vivace.config import Config
    from vivace.serve.engine import Engine

Ask = Callable[[Request], Any]
"""Makes one picture, and returns when it is there."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one server did with one round of requests."""

    server: str
    concurrency: int
    seconds: float  # from the first request to the last answer
    latencies: tuple[float, ...]  # seconds, of each picture in the order of the answers
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
) -> Round:
    """Have `concurrency` clients work through `asked` in order, each with one request at a time (a closed loop).

    The clients begin within `stagger` seconds, each at a time drawn for it. Latencies are what a client waits. Answers
    go to `kept`, by seed. Raises what came first where nothing was answered.
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
                latencies.append(round(time.perf_counter() - began, 4))
                if kept is not None:
                    kept[request.seed] = answer

    threads = [threading.Thread(target=client, args=(wait,)) for wait in starts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = round(time.perf_counter() - began, 4)
    if not latencies:
        raise failed[0]
    return Round(
        server=server, concurrency=concurrency, seconds=seconds, latencies=tuple(latencies), failed=len(failed)
    )


def rotated(servers: Sequence[str], *, number: int) -> tuple[str, ...]:
    """Who is asked first, second, ... in a round of that number: nobody is always the first, or after the same one.

    Every other turn of rounds goes backwards: of three, each comes after each other one as often (a Williams design).
    """
    backwards, start = divmod(number, len(servers))
    order = (*servers[start:], *servers[:start])
    return order[::-1] if backwards % 2 else order


def pooled(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All rounds of one server, each as a Round in plain values, as one: pictures over the time it was asked,
    percentiles over all latencies."""
    latencies = sorted(itertools.chain.from_iterable(one["latencies"] for one in rounds))
    seconds = sum(one["seconds"] for one in rounds)
    return {
        "server": rounds[0]["server"],
        "concurrency": rounds[0]["concurrency"],
        "rounds": len(rounds),
        "pictures": len(latencies),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(latencies) / seconds, 4),
        "p50_s": round(statistics.median(latencies), 4),
        "p95_s": latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
        "failed": sum(one["failed"] for one in rounds),
    }


def against(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """How many times theirs my images a second are, of all rounds; and the standard error of that, from how far single
    rounds are apart. None for it with one round."""
    whole = pooled(mine)["images_per_second"] / pooled(theirs)["images_per_second"]
    rates = [[len(one["latencies"]) / one["seconds"] for one in rounds] for rounds in (mine, theirs)]
    ratios = [ours / other for ours, other in zip(*rates, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    return round(whole, 4), None if error is None else round(error, 4)


class Turns:
    """A lock that goes to whoever has waited for it longest, as a server's queue does.

    Python's own goes to who asks next, and that is mostly who has just let go of it: a few clients would be answered
    again and again, and the others' waits would say nothing of a server.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        turn = threading.Event()
        with self._guard:
            if not self._held:
                self._held = True
                return
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *error: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False


def locked(pipe: Any, *, check: Callable[[], None] = lambda: None) -> Ask:
    """The obvious server: one pipeline, one lock, one request after the other, who came first first.

    `check` is called before each picture, and may raise.
    """
    import torch

    lock = Turns()

    def ask(request: Request) -> Any:
        assert request.size is not None
        width, height = request.size
        generator = torch.Generator("cpu").manual_seed(request.seed or 0)
        steps = {"num_inference_steps": request.steps, "width": width, "height": height}
        with lock:
            check()
            return pipe(request.prompt, **steps, generator=generator, output_type="pil").images[0]

    return ask


@contextmanager
def served(pipe: Any, *, preset: str | Config, concurrency: int) -> Iterator[Engine]:
    """Our engine over the same pipeline; `asking` asks it."""
    from vivace.serve.engine import Engine
    from vivace.serve.model import Spec

    with Engine(models={"model": Spec(source=pipe, preset=preset)}, threads=concurrency) as engine:
        yield engine


def asking(engine: Engine, *, check: Callable[[], None] = lambda: None) -> Ask:
    """What asks an engine. `check` is called before each picture, and may raise."""

    def ask(request: Request) -> Any:
        check()
        return engine.submit(request).result().pictures[0]

    return ask
