"""A bench's tables: CSV with everything, Markdown to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vivace.bench.book import gpu_of
from vivace.bench.roofline import rate_of

Line = Mapping[str, Any]

COLUMNS = (
    "contestant",
    "ms",
    "x eager",
    "cold s",
    "peak GiB",
    "TFLOP/s",
    "roofline",
    "MHz",
    "W",
    "error",
    "x eager's",
    "how",
)
MARKDOWN = tuple("time" if name == "ms" else name for name in COLUMNS)
COMPILED = ("compile", "compile-full")
"""The peers that a fast lane is measured against."""
BITS = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


def rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row a contestant of one workload, the fastest first and those without a time last; None where unknown."""
    eager = next((line for line in lines if line["contestant"] == "eager" and line["status"] == "done"), {})
    found = [_row(line, eager) for line in lines]
    return sorted(found, key=lambda row: (row["ms"] is None, row["ms"]))


def _row(line: Line, eager: Line) -> dict[str, Any]:
    ms, error = line.get("median_ms"), line.get("error")
    speed = line["tflop"] / ms * 1e3 if ms and line.get("tflop") else None
    rate = rate_of(gpu_of(line["machine"]), line.get("rate") or BITS[line["workload"]["dtype"]])
    return {
        "contestant": line["contestant"],
        "ms": ms,
        "x eager": eager["median_ms"] / ms if ms and eager else None,
        "cold s": line.get("cold_seconds"),
        "peak GiB": line["peak_bytes"] / 2**30 if line.get("peak_bytes") else None,
        "TFLOP/s": speed,
        "roofline": speed / rate if speed and rate else None,
        "MHz": line.get("power", {}).get("clock_mhz"),
        "W": line.get("power", {}).get("watts"),
        "error": error,
        "x eager's": error / eager["error"] if error and eager.get("error") else None,
        "how": line.get("detail") if line["status"] == "done" else line["why"],
    }


def verdicts(lines: Sequence[Line]) -> list[str]:
    """How much faster each of ours is than the best compiled peer, one sentence each."""
    done = [line for line in lines if line["status"] == "done"]
    peers = [line for line in done if line["contestant"] in COMPILED]
    if not peers:
        return []
    best = min(peers, key=lambda line: line["median_ms"])
    return [
        f"{line['contestant']} is {best['median_ms'] / line['median_ms']:.2f} times as fast as {best['contestant']}, "
        f"the better compiled peer, after a cold start of {line['cold_seconds']:.1f} s against "
        f"{best['cold_seconds']:.1f} s."
        for line in done
        if line["ours"]
    ]


def markdown(groups: Mapping[str, Sequence[Line]]) -> str:
    """A section for each workload: the machine, the table, the verdicts, the command."""
    parts = []
    for title, lines in groups.items():
        parts += [f"## {title}", "", _machine(lines[-1]["machine"]), ""]
        parts += [markdown_table(MARKDOWN, [_cells(row) for row in rows(lines)])]
        parts += ["", *verdicts(lines), "", *sorted({f"`{line['command']}`" for line in lines}), ""]
    return "\n".join(parts)


def duration(ms: float) -> str:
    """Milliseconds in the unit that reads best."""
    return f"{ms:.2f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _cells(row: Mapping[str, Any]) -> list[str]:
    forms = {
        "x eager": "{:.2f}",
        "cold s": "{:.1f}",
        "peak GiB": "{:.2f}",
        "TFLOP/s": "{:.0f}",
        "roofline": "{:.0%}",
        "error": "{:.2e}",
        "x eager's": "{:.2f}",
    }
    shown = {**row, "time": row["ms"] and duration(row["ms"])}
    return ["-" if shown[name] is None else forms.get(name, "{}").format(shown[name]) for name in MARKDOWN]


def markdown_table(columns: Sequence[str], cells: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = gpu_of(machine) or f"{machine['cores']} cores of {machine['processor']}"
    return f"{where}; {versions}. Medians after warm-up; error is ||out - fp32|| / ||fp32||."


def comma_separated(groups: Mapping[str, Sequence[Line]]) -> str:
    """Every workload's rows with its title in front, full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("workload", *COLUMNS))
    for title, lines in groups.items():
        writer.writerows([title, *(row[name] for name in COLUMNS)] for row in rows(lines))
    return text.getvalue()
