"""The results of a bench folder: one JSON line a contestant, appended, so that a bench continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vivace.bench.contestant import Contestant
from vivace.bench.workload import Workload

NAME = "bench.jsonl"
SETTLED = ("done", "not offered")
"""Such a result stands; one that failed is tried again, one that was not finished when it gets more time."""


def gpu_of(machine: Mapping[str, Any]) -> str | None:
    """The name of a machine's first GPU, or None."""
    return next((card["name"] for card in machine.get("gpus", ())), None)


class Book:
    """The lines of one folder. The last line of a contestant is its result; earlier ones stay as history."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text("utf-8", errors="replace") if self.path.is_file() else ""
        self._cut = bool(text) and not text.endswith("\n")
        self.lines = [line for line in map(_read, text.splitlines()) if line is not None]

    def append(self, line: Mapping[str, Any]) -> None:
        """Keep a result, on disk at once."""
        self.lines.append(dict(line))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._cut + json.dumps(line) + "\n")
        self._cut = False

    def settled(
        self, workload: Workload, contestant: Contestant, *, machine: Mapping[str, Any], limit: float
    ) -> Mapping[str, Any] | None:
        """The result of that contestant on such a machine, where it needs no other try."""
        key = _key(workload.to_dict(), contestant.label, machine)
        found = next((line for line in reversed(self.contests()) if _key_of(line) == key), None)
        if found is None or found["status"] in SETTLED:
            return found
        return found if found["status"] == "not finished" and found["limit_seconds"] >= limit else None

    def contests(self) -> list[dict[str, Any]]:
        """Every result of a contestant in a workload, oldest first."""
        return [line for line in self.lines if "contestant" in line]

    def latest(self) -> dict[str, list[dict[str, Any]]]:
        """The last result of every contestant, by the name of workload and machine."""
        last = {_key_of(line): line for line in self.contests()}
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in last.values():
            where = gpu_of(line["machine"]) or line["machine"]["processor"]
            groups.setdefault(f"{line['title']} on {where}", []).append(line)
        return groups

    def kernels(self) -> list[dict[str, Any]]:
        """The last result of every kernel's case on every machine."""
        lines = (line for line in self.lines if "kernel" in line)
        return list({(line["kernel"], line["case"], place_of(line["machine"])): line for line in lines}.values())


def _read(line: str) -> dict[str, Any] | None:
    """A line's values; None for one that a machine that stopped, or a disk that was full, has cut short."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def task_of(contestant: Contestant) -> dict[str, Any]:
    """A contestant as plain values."""
    return {**asdict(contestant), "fields": list(contestant.fields)}


def place_of(machine: Mapping[str, Any]) -> str:
    """What figures have to share to stand beside one another: the GPU or processor, and torch."""
    return f"{gpu_of(machine) or machine['processor']} torch {machine['versions'].get('torch')}"


def _key(workload: Mapping[str, Any], label: str, machine: Mapping[str, Any]) -> str:
    return json.dumps([workload, label, place_of(machine)], sort_keys=True)


def _key_of(line: Mapping[str, Any]) -> str:
    return _key(line["workload"], line["contestant"], line["machine"])
