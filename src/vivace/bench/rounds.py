"""The rounds that servers were asked in: a file that goes on where it stopped, each server's as one line, a table."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import vivace
from vivace.bench.interpreter import tabulate
from vivace.bench.table import markdown_table
from vivace.serve.load import against, pooled, requests, rotated
from vivace.serve.request import Request

PROMPT = "a small red star above a blue ring"
ROUNDS = 6  # a multiple of three servers: each is as often the first, the second and the third
LEAST = 3  # pictures of a client in a round: its end, when some have nothing left to ask, shall be a small part of it

Line = dict[str, Any]


class Turn(NamedTuple):
    """One server asked in one round by so many clients; without a number it is only looked at."""

    clients: int
    number: int | None
    server: str


def asked(
    number: int, *, of: int, clients: int, pictures: int, size: tuple[int, int], steps: tuple[int, int]
) -> list[Request]:
    """The requests of one of so many rounds, which nobody was asked before; `pictures` are those of all, at least."""
    count = max(-(-pictures // of), LEAST * clients)
    return requests(count * (number + 1), prompt=PROMPT, size=size, steps=steps, seed=0)[-count:]


@dataclass(kw_only=True)
class Record:
    """What was measured so far of one load on these servers, and its file.

    A round in which not all servers were asked yet goes on with the others.
    """

    path: Path
    command: str
    facts: Mapping[str, Any]
    servers: Sequence[str]
    rounds: list[Line]
    profiles: list[Line]

    def left(self, clients: Sequence[int], *, rounds: int, profile: bool) -> list[Turn]:
        """What is to be measured yet, in order."""
        numbers = (*range(rounds), *((None,) if profile else ()))
        known = {Turn(one["concurrency"], one["round"], one["server"]) for one in self.rounds}
        known |= {Turn(one["concurrency"], None, self.servers[-1]) for one in self.profiles}
        return [turn for of in itertools.product(clients, numbers) for turn in self._turns(*of) if turn not in known]

    def add(self, turn: Turn, line: Line) -> None:
        """Keep what was measured, at once: it stays when somebody ends the bench."""
        (self.profiles if turn.number is None else self.rounds).append(line)
        self.write()

    def write(self) -> None:
        """The file, and the table beside it. A process that is killed meanwhile leaves the earlier ones."""
        lines = results(self.rounds, self.servers)
        rest = {"results": lines, "profiles": self.profiles, "rounds": self.rounds}
        _put(self.path, json.dumps({"command": self.command, **self.facts, **rest}, indent=1))
        _put(self.path.with_suffix(".md"), f"{table(lines)}\n{tabulate(self.profiles)}")

    def _turns(self, clients: int, number: int | None) -> list[Turn]:
        servers = self.servers[-1:] if number is None else rotated(self.servers, number=number)
        return [Turn(clients, number, server) for server in servers]


def _put(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def code() -> str:
    """Of this library's source, in a few letters: rounds of another one are not among its own."""
    digest, root = hashlib.sha256(), Path(vivace.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def record(
    folder: Path, name: str, *, command: str, facts: Mapping[str, Any], servers: Sequence[str], again: bool
) -> Record:
    """That of this load: one that was begun on this machine by this code, or a new one; with `again` without rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"command": command, "servers": servers}
    facts = {**facts, "code": code()}
    plain = json.loads(json.dumps(facts))
    for path in sorted(folder.glob(f"*-serve-{name}*.json")):
        found = json.loads(path.read_text())
        if all(found.get(key) == value for key, value in plain.items()):
            kept = ([], []) if again else (found["rounds"], found["profiles"])
            return Record(path=path, facts=facts, rounds=kept[0], profiles=kept[1], **told)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-serve-{name}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    path = next(path for one in names if not (path := folder / f"{one}.json").exists())
    return Record(path=path, facts=facts, rounds=[], profiles=[], **told)


def results(rounds: Sequence[Mapping[str, Any]], servers: Sequence[str]) -> list[Line]:
    """One line for each number of clients and server: its rounds as one, and its speed over the obvious servers', of
    the rounds that both were asked in; None where there are none yet."""
    lines = []
    for clients in sorted({one["concurrency"] for one in rounds}):
        these = sorted((one for one in rounds if one["concurrency"] == clients), key=lambda one: one["round"])
        of = {name: [one for one in these if one["server"] == name] for name in servers}
        stock, locked, _ = of.values()
        for mine in filter(None, of.values()):
            line = pooled(mine) | {key: mine[0][key] for key in ("cold_s", "noise_floor")}
            apart = [one["from_stock"] for one in mine if one["from_stock"] is not None]
            line["from_stock"] = round(statistics.fmean(apart), 4) if apart else None
            line["cpu_s_per_image"] = round(_sum(mine, "cpu_s") / line["pictures"], 4)
            for key, theirs in (("over_stock", stock), ("over_ours_locked", locked)):
                line[key], line[f"{key}_error"] = _against(mine, theirs)
            if "calls" in mine[0]:
                line["device_busy"] = round(_sum(mine, "device_s") / line["seconds"], 3)
                line["requests_per_call"] = round(_sum(mine, "requests_in_calls") / _sum(mine, "calls"), 2)
            if "work_gib" in mine[0]:
                line["work_gib"] = max(one["work_gib"] for one in mine)
            lines.append(line)
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The measurements to read, beside the two obvious servers. ± is the standard error, from round to round."""
    columns = ("concurrency", "server", "images/s", "x stock", "x ours locked", "p50 s", "p95 s", "from stock", "floor")
    rows = [
        [str(line["concurrency"]), line["server"], f"{line['images_per_second']:.2f}",
         times(line["over_stock"], line["over_stock_error"]),
         times(line["over_ours_locked"], line["over_ours_locked_error"]),
         f"{line['p50_s']:.2f}", f"{line['p95_s']:.2f}",
         "-" if line["from_stock"] is None else f"{line['from_stock']:.3f}", f"{line['noise_floor']:.3f}"]
        for line in lines
    ]  # fmt: skip
    return markdown_table(columns, rows) + "\n"


def times(ratio: float | None, error: float | None) -> str:
    """A ratio with its standard error, where there is one."""
    if ratio is None:
        return "-"
    return f"{ratio:.3f} ± {error:.3f}" if error else f"{ratio:.3f}"


def _against(
    mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    both = {one["round"] for one in mine} & {one["round"] for one in theirs}
    pair = [[one for one in rounds if one["round"] in both] for rounds in (mine, theirs)]
    return against(*pair) if both else (None, None)


def _sum(rounds: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(one[key] for one in rounds)
