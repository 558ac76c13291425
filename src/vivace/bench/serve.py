"""Serving under load: our engine beside the two obvious servers, each a lock around one pipeline.

vivace bench --serve sd:1.5 --concurrency 1,4,16 --pictures 64 --steps 20
vivace bench --serve builtin --profile

All three are up the whole time and are asked in turns, a few pictures each: a machine whose speed drifts is as quick
for one as for the others. Both of ours are around one and the same accelerated pipeline, so that nothing but the server
differs. Who is not asked only waits, which costs nothing.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.bench.allowance import Allowance, NoTime, Spent
from vivace.bench.interpreter import Interpreter
from vivace.bench.rounds import ROUNDS, Line, Record, Turn, asked, record
from vivace.errors import InputError, first_line
from vivace.families import FAMILIES
from vivace.serve.load import Ask, asking, locked, put, served

if TYPE_CHECKING:
    from vivace.serve.engine import Engine
    from vivace.serve.request import Request
    from vivace.serve.worker import Batch

COMPARED = 4  # pictures of which the noise floor is measured
STAGGER = 0.5  # seconds within which the clients begin

OnLine = Callable[[Mapping[str, Any]], None]
"""Told of each server's line when it is there."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, of every server the same."""

    title: str
    size: tuple[int, int]
    steps: tuple[int, int]
    pictures: int  # of each server and number of clients, at least
    rounds: int
    preset: str

    @property
    def servers(self) -> tuple[str, str, str]:
        """The contestants: the two obvious ones, then ours."""
        return ("stock, one lock", f"{self.preset}, one lock", f"{self.preset}, our engine")

    def requests(self, clients: int, *, number: int) -> list[Request]:
        """What is asked in the round of that number: pictures of its own."""
        shape = {"size": self.size, "steps": self.steps}
        return asked(number, of=self.rounds, clients=clients, pictures=self.pictures, **shape)


@dataclass(kw_only=True)
class Server:
    """A contestant that is up."""

    name: str
    ask: Ask
    facts: Mapping[str, float]  # what is the same in every round, for JSON
    engine: Engine | None = None  # ours
    calls: list[Batch] = field(default_factory=list)  # of ours
    warmed: int = 0  # clients that it has had at a time, before it counted


def measure(
    make: Callable[[], Any], load: Load, turns: Sequence[Turn], *, allowed: Allowance, found: Record, on_line: OnLine
) -> None:
    """Measure these turns of the pipeline that is made, in order; each one's line is in `found` at once. Raises Spent
    before the first one that would outlast what is allowed."""
    floor, began = next((one["noise_floor"] for one in found.rounds), None), time.monotonic()
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    with up(pipe, load, clients=max(turn.clients for turn in turns), allowed=allowed, floor=floor) as servers:
        ready = round(time.monotonic() - began, 1)
        for (clients, number), these in itertools.groupby(turns, key=lambda turn: (turn.clients, turn.number)):
            if number is not None:
                contest = Contest(servers=servers, load=load, allowed=allowed, found=found, ready_s=ready)
                contest.one_round(tuple(these), on_line=on_line)
                continue
            warm(servers, load, clients=clients, allowed=allowed)
            allowed.need(load.servers[-1], load.requests(clients, number=0))
            found.add(next(these), profiled(servers, load, clients=clients))


@contextmanager
def up(
    pipe: Any, load: Load, *, clients: int, allowed: Allowance | None = None, floor: float | None = None
) -> Iterator[dict[str, Server]]:
    """The contestants by name, for so many clients at most; at the end the pipeline is as it was.

    `floor` is the noise floor where that is known already. Raises Spent where there is no time to get ready.
    """
    from vivace.accelerate import accelerate, restore
    from vivace.config import resolve

    allowed = allowed or Allowance(None)
    few = load.requests(COMPARED, number=0)[:COMPARED]
    names = load.servers
    stock = copy.deepcopy(pipe)
    ask, cold = _first(names[0], stock, few, allowed)
    if floor is None:
        allowed.need(names[0], few * 3)
        exact = [ask(request) for request in few]
        floor = distance(exact, [_twice(stock, request)[1] for request in few])
    found = [Server(name=names[0], ask=ask, facts={"cold_s": round(cold, 2), "noise_floor": floor})]
    # Prompts are not remembered, as in every bench: one of ours would find what the other has encoded.
    config, began = resolve(load.preset, prompts="off"), time.perf_counter()
    accelerate(pipe, config)
    try:
        seconds = time.perf_counter() - began
        ask, cold = _first(names[1], pipe, few, allowed)
        if not allowed.expected(names[2], few):  # about as quick as a lock, until it was asked
            allowed.learn(names[2], few, seconds=allowed.expected(names[1], few))
        facts = {"cold_s": round(seconds + cold, 2), "noise_floor": floor}
        with served(pipe, preset=config, concurrency=clients) as engine:
            ours = Server(name=names[2], ask=asking(engine, check=allowed.check), facts=facts, engine=engine)
            engine.observe(batch=ours.calls.append, job=lambda job: None)
            found += [Server(name=names[1], ask=ask, facts=facts), ours]
            yield {server.name: server for server in found}
    finally:
        restore(pipe)


def warm(servers: Mapping[str, Server], load: Load, *, clients: int, allowed: Allowance) -> None:
    """Have the engine meet every batch size that so many clients can bring, before it counts. Raises Spent."""
    ours, first = servers[load.servers[-1]], load.requests(clients, number=0)[: 2 * clients]
    if ours.warmed >= clients:
        return
    allowed.need(ours.name, first)
    put(ours.ask, first, concurrency=clients, server=ours.name)
    allowed.check()
    ours.warmed = clients


@dataclass(kw_only=True)
class Contest:
    """The contestants of a load, each asked for the same pictures in every round."""

    servers: Mapping[str, Server]
    load: Load
    allowed: Allowance
    found: Record
    ready_s: float  # seconds until all were up

    def one_round(self, turns: Sequence[Turn], *, on_line: OnLine) -> None:
        """The turns of one round, as many as there is time for. Raises Spent where that is not all."""
        kept: dict[str, dict[int | None, Any]] = {}
        lines: list[Line] = []
        spent = None
        for turn in turns:
            try:
                line, kept[turn.server] = self._turn(turn, with_stock=self.load.servers[0] in kept)
            except Spent as error:
                spent = error
                break
            lines.append(line)
            self.found.add(turn, line)
            on_line(line)
        if lines:
            self._compare(lines, kept)
            self.found.write()
        if spent:
            raise spent

    def _turn(self, turn: Turn, *, with_stock: bool) -> tuple[Line, dict[int | None, Any]]:
        """Raises Spent, before or in the middle of it."""
        server, these = self.servers[turn.server], self._requests(turn)
        if server.engine:
            warm(self.servers, self.load, clients=turn.clients, allowed=self.allowed)
        # Where it is the last that there is time for, stock still has to draw what it is compared with.
        stock = self.load.servers[0]
        compared = 0.0 if with_stock or turn.server == stock else self.allowed.expected(stock, these[:COMPARED])
        self.allowed.need(server.name, these, more=compared)
        began = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        line, kept = _measured(server, these, clients=turn.clients)
        if self.allowed.cut:
            raise Spent(self.allowed.expected(server.name, these))
        self.allowed.learn(server.name, these, seconds=line["seconds"])
        facts = {"began": began, "ready_s": self.ready_s, "from_stock": None}
        return {"round": turn.number, **line, **facts}, kept

    def _compare(self, lines: Sequence[Line], kept: dict[str, dict[int | None, Any]]) -> None:
        """Set how far the pictures of each line are from stock's: of those few that stock draws now, where it was asked
        for all of them in another run, or will be."""
        stock = self.servers[self.load.servers[0]]
        if stock.name not in kept:
            few = self.load.requests(lines[0]["concurrency"], number=lines[0]["round"])[:COMPARED]
            with suppress(Spent):
                kept[stock.name] = {request.seed: stock.ask(request) for request in few}
        exact = kept.get(stock.name, {})
        for line in lines:
            # By seed: one that failed is in nobody's comparison.
            mine = kept[line["server"]]
            both = exact.keys() & mine.keys()
            if both:
                line["from_stock"] = distance([mine[seed] for seed in both], [exact[seed] for seed in both])

    def _requests(self, turn: Turn) -> list[Request]:
        return self.load.requests(turn.clients, number=turn.number or 0)


def profiled(servers: Mapping[str, Server], load: Load, *, clients: int) -> Line:
    """One more round of the engine alone, which is looked at: what looking costs is in no figure of speed."""
    ours = servers[load.servers[-1]]
    assert ours.engine is not None
    ours.calls.clear()
    looking = Interpreter(ours.engine)
    found = put(ours.ask, load.requests(clients, number=0), concurrency=clients, server=ours.name, stagger=STAGGER)
    return {"concurrency": clients, **looking.stop(ours.calls, pictures=len(found.latencies))}


def _measured(server: Server, these: Sequence[Request], *, clients: int) -> tuple[Line, dict[int | None, Any]]:
    kept: dict[int | None, Any] = {}
    server.calls.clear()
    before, spent = _weights(), time.process_time()
    found = put(server.ask, these, concurrency=clients, server=server.name, stagger=STAGGER, kept=kept)
    line = {**asdict(found), "cpu_s": round(time.process_time() - spent, 3), **server.facts}
    if server.calls:
        line["device_s"] = round(sum(call.seconds for call in server.calls), 3)
        line |= {"calls": len(server.calls), "requests_in_calls": sum(call.size for call in server.calls)}
    if before is not None:
        line["work_gib"] = round((_peak() - before) / 2**30, 2)
    return line, kept


def _first(name: str, pipe: Any, few: Sequence[Request], allowed: Allowance) -> tuple[Ask, float]:
    """A lock around a pipeline, and the seconds to its first picture; from the second one its pace is known.

    Raises InputError where it makes none, Spent.
    """
    ask, began = locked(pipe, check=allowed.check), time.perf_counter()
    try:
        ask(few[0])
    except ValueError as error:  # how pipelines refuse what they were called with
        raise InputError(f"{type(pipe).__name__} refused: {first_line(error)}") from error
    cold, began = time.perf_counter() - began, time.perf_counter()
    ask(few[1])
    allowed.learn(name, few[1:2], seconds=time.perf_counter() - began)
    return ask, cold


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


def _weights() -> int | None:
    """Bytes that lie on the GPU before a round, from which its peak is counted anew; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def pipeline_of(name: str, *, device: str, dtype: str, tiny: bool = False) -> tuple[Callable[[], Any], tuple[int, int]]:
    """What makes a pipeline, and its usual size: `FAMILY[:variant]` at true size with random weights, or what `load`
    takes.

    Raises InputError for what makes no pictures from a prompt.
    """
    from vivace.bench.subject import build
    from vivace.bench.workload import workload_of
    from vivace.load import find, load

    source = None if name.partition(":")[0] in FAMILIES else find(name)
    family = source.family if source else FAMILIES[name.partition(":")[0]]
    if family and not (family.media == "image" and "prompt" in family.takes):
        raise InputError(f"--serve asks for pictures from a prompt, and {family.title} makes none; name another model")
    if source:
        return partial(load, name, device=device, dtype=dtype), source.size or (512, 512)
    workload = workload_of(name, device=device, dtype=dtype, tiny=tiny, end_to_end=True)
    return partial(build, workload), workload.size


def run(
    model: str,
    *,
    folder: Path,
    command: str,
    concurrency: Sequence[int] = (1, 4, 16),
    pictures: int = 64,
    rounds: int = ROUNDS,
    steps: tuple[int, int] = (15, 25),
    size: tuple[int, int] | None = None,
    preset: str = "exact",
    device: str | None = None,
    dtype: str | None = None,
    tiny: bool = False,
    profile: bool = False,
    again: bool = False,
    allowed: Allowance | None = None,
    on_line: OnLine = lambda line: None,
) -> tuple[Path, int]:
    """Put the load on the three servers of a model; the file with the results, and the turns left for the next time.

    What the file has already is not measured again, and no server is asked in a round for longer than is `allowed`, by
    what its last picture took. Raises InputError, also where there is no time for a single turn.
    """
    from vivace.load import resolve_device, resolve_dtype
    from vivace.machine import machine

    allowed, place = allowed or Allowance(None), resolve_device(device)
    number = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    make, usual = pipeline_of(model, device=str(place), dtype=number, tiny=tiny)
    load = Load(title=model, size=size or usual, steps=steps, pictures=pictures, rounds=rounds, preset=preset)
    facts = {"machine": machine(), "device": str(place), "dtype": number, "tiny": tiny, "load": asdict(load)}
    name, told = "".join(c if c.isalnum() else "-" for c in model), {"command": command, "servers": load.servers}
    found = record(folder, name, facts=facts, again=again, **told)
    turns = found.left(concurrency, rounds=rounds, profile=profile)
    try:
        if turns:
            _foresee(turns[0], load, allowed=allowed, found=found)
            measure(make, load, turns, allowed=allowed, found=found, on_line=on_line)
    except Spent as error:
        left = found.left(concurrency, rounds=rounds, profile=profile)
        if len(left) == len(turns):
            raise NoTime(
                f"{allowed.seconds:g} s are over before a server of {model} is measured: that would take about "
                f"{allowed.taken + error.seconds:.0f} s in all; raise --budget-s, or ask for fewer --pictures"
            ) from None
        return found.path, len(left)
    return found.path, 0


def _foresee(turn: Turn, load: Load, *, allowed: Allowance, found: Record) -> None:
    """Raises Spent where it is known from the last run that there is no time for that turn."""
    for one in found.rounds:
        asked = load.requests(one["concurrency"], number=one["round"])
        allowed.learn(one["server"], asked, seconds=one["seconds"])
    ready = found.rounds[-1]["ready_s"] if found.rounds else 0.0
    allowed.need(turn.server, load.requests(turn.clients, number=turn.number or 0), more=ready)
