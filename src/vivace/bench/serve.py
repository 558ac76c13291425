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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.bench.interpreter import Interpreter
from vivace.bench.rounds import ROUNDS, Line, Turn, asked, record
from vivace.errors import InputError, first_line
from vivace.families import FAMILIES
from vivace.serve.load import Ask, asking, locked, put, rotated, served

if TYPE_CHECKING:
    from vivace.serve.engine import Engine
    from vivace.serve.request import Request
    from vivace.serve.worker import Batch

COMPARED = 4  # pictures of which the noise floor is measured
STAGGER = 0.5  # seconds within which the clients begin


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


def measured(pipe: Any, load: Load, turns: Sequence[Turn]) -> Generator[tuple[Turn, list[Line]]]:
    """The lines of these turns for JSON: one a server, or what was seen of the engine."""
    if not turns:
        return
    with up(pipe, load, clients=max(turn.clients for turn in turns)) as servers:
        for clients, these in itertools.groupby(turns, key=lambda turn: turn.clients):
            warm(servers, load, clients=clients)
            for turn in these:
                if turn.number is None:
                    yield turn, [profiled(servers, load, clients=clients)]
                else:
                    yield turn, one_round(servers, load, clients=clients, number=turn.number)


@contextmanager
def up(pipe: Any, load: Load, *, clients: int) -> Iterator[dict[str, Server]]:
    """The contestants by name, for so many clients at most; at the end the pipeline is as it was."""
    from vivace.accelerate import accelerate, restore
    from vivace.config import resolve

    few = load.requests(COMPARED, number=0)[:COMPARED]
    stock = copy.deepcopy(pipe)
    ask, cold = _first(stock, few[0])
    exact = [ask(request) for request in few]
    floor = {"noise_floor": distance(exact, [_twice(stock, request)[1] for request in few])}
    names = load.servers
    found = [Server(name=names[0], ask=ask, facts={"cold_s": round(cold, 2), **floor})]
    # Prompts are not remembered, as in every bench: one of ours would find what the other has encoded.
    config, began = resolve(load.preset, prompts="off"), time.perf_counter()
    accelerate(pipe, config)
    try:
        seconds = time.perf_counter() - began
        ask, cold = _first(pipe, few[0])
        facts = {"cold_s": round(seconds + cold, 2), **floor}
        with served(pipe, preset=config, concurrency=clients) as engine:
            ours = Server(name=names[2], ask=asking(engine), facts=facts, engine=engine)
            engine.observe(batch=ours.calls.append, job=lambda job: None)
            found += [Server(name=names[1], ask=ask, facts=facts), ours]
            yield {server.name: server for server in found}
    finally:
        restore(pipe)


def warm(servers: Mapping[str, Server], load: Load, *, clients: int) -> None:
    """Meet every batch size that the load can bring before it counts."""
    first = load.requests(clients, number=0)[: 2 * clients]
    for name, server in servers.items():
        put(server.ask, first if server.engine else first[:1], concurrency=clients, server=name)


def one_round(servers: Mapping[str, Server], load: Load, *, clients: int, number: int) -> list[Line]:
    """Each server asked for the same pictures, in the order of this round, as lines for JSON."""
    these, order = load.requests(clients, number=number), rotated(load.servers, number=number)
    found = [_measured(servers[name], these, clients=clients) for name in order]
    stock = found[order.index(load.servers[0])][1]
    lines = []
    for line, kept in found:
        # By seed: one that failed is in nobody's comparison.
        both = stock.keys() & kept.keys()
        apart = distance([kept[seed] for seed in both], [stock[seed] for seed in both]) if both else None
        lines.append({"round": number, **line, "from_stock": apart})
    return lines


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


def _first(pipe: Any, request: Request) -> tuple[Ask, float]:
    """A lock around a pipeline, and the seconds to its first picture. Raises InputError where it makes none."""
    ask, began = locked(pipe), time.perf_counter()
    try:
        ask(request)
    except ValueError as error:  # how pipelines refuse what they were called with
        raise InputError(f"{type(pipe).__name__} refused: {first_line(error)}") from error
    return ask, time.perf_counter() - began


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


def pipeline_of(name: str, *, device: str, dtype: str, tiny: bool = False) -> tuple[Any, tuple[int, int]]:
    """A pipeline and its usual size: `FAMILY[:variant]` at true size with random weights, or what `load` takes.

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
        return load(name, device=device, dtype=dtype), source.size or (512, 512)
    workload = workload_of(name, device=device, dtype=dtype, tiny=tiny, end_to_end=True)
    return build(workload), workload.size


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
    budget: float | None = None,
    on_round: Callable[[Sequence[Mapping[str, Any]]], None] = lambda lines: None,
) -> tuple[Path, int]:
    """Put the load on the three servers of a model; the file with the results, and the rounds left for the next time.

    What the file has already is not measured again, and no round is begun that would outlast `budget` seconds, by what
    a picture of the one before took. Raises InputError.
    """
    from vivace.load import resolve_device, resolve_dtype
    from vivace.machine import machine

    began, place = time.monotonic(), resolve_device(device)
    number = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    pipe, usual = pipeline_of(model, device=str(place), dtype=number, tiny=tiny)
    pipe.set_progress_bar_config(disable=True)
    load = Load(title=model, size=size or usual, steps=steps, pictures=pictures, rounds=rounds, preset=preset)
    facts = {"machine": machine(), "device": str(place), "dtype": number, "tiny": tiny, "load": asdict(load)}
    servers = load.servers
    found = record(folder, "".join(c if c.isalnum() else "-" for c in model), facts=facts, servers=servers, again=again)
    left = found.left(concurrency, rounds=rounds, profile=profile)
    each = 0.0  # seconds of a picture, of all servers together
    with closing(measured(pipe, load, tuple(left))) as lines:
        for turn, line in lines:
            left.remove(turn)
            kept = found.profiles if turn.number is None else found.rounds
            kept += line
            # At once: what was measured so far is kept when somebody ends it.
            found.write(command=command)
            if turn.number is not None:
                on_round(line)
                each = sum(one["seconds"] for one in line) / len(load.requests(turn.clients, number=0))
            following = each * len(load.requests(left[0].clients, number=0)) if left else 0.0
            # One that is ended in its middle is lost.
            if budget is not None and time.monotonic() - began + following > budget:
                break
    return found.path, len(left)
