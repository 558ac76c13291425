"""What a bench folder shows: tables and a chart, made anew from its lines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import vivace
from vivace.bench.book import Book, gpu_of, place_of
from vivace.bench.chart import draw
from vivace.bench.table import comma_separated, markdown, markdown_table
from vivace.errors import InputError
from vivace.machine import machine

KERNEL_COLUMNS = ("kernel", "case", "µs", "bound µs", "share", "of")
COSTLIEST = ("kernel", "launches", "ms", "share")


def write(folder: Path) -> None:
    """Writes bench.md, and for contestants bench.csv and bench.png."""
    book = Book(folder)
    groups, kernels = book.latest(), book.kernels()
    if groups:
        (folder / "bench.csv").write_text(comma_separated(groups))
        draw(groups, folder / "bench.png")
    parts = [markdown(groups), _shares(groups), _kernels(kernels), _profiles(groups)]
    (folder / "bench.md").write_text("\n".join(part for part in parts if part))


def record(what: str) -> Path:
    """Where the figures of one kind go, by day and machine: benchmarks/<date>-<gpu>-<what>.json."""
    import torch

    told = torch.cuda.get_device_name().lower().split() if torch.cuda.is_available() else ["cpu"]
    name = next((word for word in told if re.fullmatch(r"[a-z]+\d+[a-z]*", word)), told[-1])
    return Path("benchmarks") / f"{datetime.now(UTC):%Y-%m-%d}-{name}-{what}.json"


def code() -> str:
    """What the package's code is, in twelve letters: a record's rows are of one."""
    digest, root = hashlib.sha256(), Path(vivace.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def rows_of(path: Path, *, command: str) -> dict[str, Any]:
    """The rows that the record at `path` has, by name; none where there is no such file.

    Raises InputError for one of another command, machine or code: its rows would stand under this one's name.
    """
    if not path.is_file():
        return {}
    kept = json.loads(path.read_text("utf-8"))
    here = (command, place_of(machine()), f"code {code()}")
    if (
        there := (kept["command"], place_of(kept["machine"]), f"code {kept.get('code', 'that it does not name')}")
    ) != here:
        raise InputError(f"{path} has rows of {' on '.join(there)}, and this is {' on '.join(here)}; name another -o")
    return kept["rows"]


def _shares(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The seconds of each part of whole pictures, and their share."""
    sections = []
    for title, lines in groups.items():
        timed = [line for line in lines if line.get("parts")]
        names = list(dict.fromkeys(name for line in timed for name in line["parts"]))
        rows = [[line["contestant"], *(_share(line["parts"].get(name)) for name in names)] for line in timed]
        if rows:
            sections.append(f"### {title}\n\n{markdown_table(('contestant', *names), rows)}\n")
    said = "A picture more, which waits for the device around each part; between: scheduler, guidance, the host."
    return "\n".join(["## Where a picture's seconds go", "", said, "", *sections]) if sections else ""


def _share(part: Mapping[str, float] | None) -> str:
    return "-" if part is None else f"{part['seconds']:.3f} s, {part['share']:.1%}"


def _kernels(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    where = sorted({gpu_of(line["machine"]) or "no GPU" for line in lines})
    rows = [_kernel_row(line) for line in sorted(lines, key=lambda line: line["kernel"])]
    return f"## Kernels on {' and '.join(where)}\n\n{markdown_table(KERNEL_COLUMNS, rows)}\n"


def _kernel_row(line: Mapping[str, Any]) -> list[str]:
    if line["status"] != "done":
        return [line["kernel"], line["case"], "-", "-", "-", line["why"]]
    copy = f"a copy's {line['copy_tb_per_second']:.2f} TB/s"
    times = f"{line['microseconds']:.1f}", f"{line['bound_microseconds']:.1f}", f"{line['share']:.0%}"
    return [line["kernel"], line["case"], *times, copy]


def _profiles(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for title, lines in groups.items():
        for line in lines:
            if costly := line.get("profile"):
                rows = [[f"`{r['name']}`", f"{r['launches']:g}", f"{r['ms']:.3f}", f"{r['share']:.1%}"] for r in costly]
                parts.append(f"### {line['contestant']}, {title}\n\n{markdown_table(COSTLIEST, rows)}\n")
    return "\n".join(["## Where the time goes", "", *parts]) if parts else ""
