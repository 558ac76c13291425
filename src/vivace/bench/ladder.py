"""What a ladder's results say: CSV with diffusion-fast's columns, JSON, Markdown, and one bar chart."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vivace.bench.book import Book, gpu_of
from vivace.bench.ladder_chart import draw
from vivace.bench.rungs import RUNGS, columns_of
from vivace.bench.table import Line, markdown_table
from vivace.bench.workload import Workload, from_dict

MARKDOWN = ("rung", "seconds", "x first", "cold s", "peak GiB", "error", "right", "how")


def write(folder: Path, *, name: str, workload: Workload) -> Path:
    """Writes ladder-<name>.csv, .json, .png and .md from the folder's results; returns the chart's path."""
    groups = Book(folder).latest()
    found = [line for lines in groups.values() for line in lines if line["workload"] == workload.to_dict()]
    steps = rows(found)
    stem = folder / f"ladder-{name}"
    stem.with_suffix(".csv").write_text(comma_separated(found))
    stem.with_suffix(".json").write_text(json.dumps({"title": workload.name, "rungs": steps}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(found, title=workload.name))
    chart = stem.with_suffix(".png")
    if found:
        draw(steps, title=workload.name, where=_where(found[-1]["machine"]), path=chart)
    return chart


def rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row a rung, from the bottom to the top, ours last; None where unknown."""
    order = [rung.name for rung in RUNGS]
    ladder = sorted(
        (line for line in lines if line["ours"] or line["contestant"] in order),
        key=lambda line: (line["ours"], order.index(line["contestant"]) if not line["ours"] else 0),
    )
    first = next((line["median_ms"] for line in ladder if line["status"] == "done"), None)
    return [_row(line, first) for line in ladder]


def _row(line: Line, first: float | None) -> dict[str, Any]:
    ms, quiz = line.get("median_ms"), line.get("quiz")
    return {
        "rung": line["contestant"],
        "ours": line["ours"],
        "seconds": ms / 1e3 if ms else None,
        "x first": first / ms if first and ms else None,
        "cold s": line.get("cold_seconds"),
        "peak GiB": line["peak_bytes"] / 2**30 if line.get("peak_bytes") else None,
        "error": line.get("error"),
        "right": quiz["right"] / quiz["total"] if quiz else None,
        "of": quiz["total"] if quiz else None,
        "how": line.get("detail") if line["status"] == "done" else line["why"],
    }


def comma_separated(lines: Sequence[Line]) -> str:
    """The rungs that were timed, with the columns of diffusion-fast's results, and behind its tag some of ours."""
    by_name = {line["contestant"]: line for line in lines}
    text, writer = io.StringIO(), None
    for row in rows(lines):
        if row["seconds"] is None:
            continue
        settings = _settings(by_name[row["rung"]])
        values = {
            **settings,
            "time (secs)": round(row["seconds"], 4),
            "memory (gbs)": round(row["peak GiB"], 3) if row["peak GiB"] else "",
            "actual_gpu_memory (gbs)": _gib(by_name[row["rung"]].get("reserved_bytes")),
            "tag": row["rung"],
            "cold_start (secs)": row["cold s"],
            "error": "" if row["error"] is None else float(f"{row['error']:.4g}"),
            "right": "" if row["right"] is None else round(row["right"], 4),
        }
        writer = writer or csv.DictWriter(text, fieldnames=list(values), lineterminator="\n")
        if not text.tell():
            writer.writeheader()
        writer.writerow(values)
    return text.getvalue()


def _settings(line: Line) -> dict[str, Any]:
    """What is on at a rung, in that project's words."""
    workload, on = from_dict(line["workload"]), columns_of(line["contestant"])
    quantised = [note for note in (line.get("report") or {}).get("passes", ()) if note["name"] == "quant"]
    if line["ours"]:
        quant = any(note["done"] for note in quantised)
        on = {"bf16": True, "sdpa": True, "fused_qkv_projections": True, "do_quant": quant}
    compiled = bool(on.get("compile"))
    mode = re.search(r"mode=(?:'([^']+)'|None)", line.get("detail") or "")  # the denoiser's, which is told first
    return {
        "pipeline_cls": workload.published.pipeline or workload.facts.pipelines[0],
        "ckpt_id": workload.model or workload.published.hub_id,
        "bf16": bool(on.get("bf16")) and workload.dtype == "bfloat16",
        "sdpa": bool(on.get("sdpa")),
        "fused_qkv_projections": bool(on.get("fused_qkv_projections")),
        "upcast_vae": False,
        "batch_size": 1,
        "num_inference_steps": workload.steps,
        f"compile_{workload.facts.denoisers[0]}": compiled,
        "compile_vae": compiled,
        "compile_mode": ((mode and mode[1]) or "default") if compiled else "",
        "change_comp_config": False,
        "do_quant": bool(on.get("do_quant")),
    }


def markdown(lines: Sequence[Line], *, title: str) -> str:
    """The machine, the table and the command."""
    if not lines:
        return ""
    cells = [_cells(row) for row in rows(lines)]
    commands = sorted({f"`{line['command']}`" for line in lines})
    error = "Medians after warm-up; error is ||out - fp32|| / ||fp32||."
    parts = [f"## {title}", "", f"{_where(lines[-1]['machine'])}. {error}", "", markdown_table(MARKDOWN, cells), ""]
    return "\n".join([*parts, *commands, ""])


def _cells(row: Mapping[str, Any]) -> list[str]:
    forms = {"seconds": "{:.3f}", "x first": "{:.2f}", "cold s": "{:.1f}", "peak GiB": "{:.2f}", "error": "{:.1e}"}
    shown = {**row, "right": None if row["right"] is None else f"{row['right']:.0%} of {row['of']}"}
    return ["-" if shown[name] is None else forms.get(name, "{}").format(shown[name]) for name in MARKDOWN]


def _where(machine: Mapping[str, Any]) -> str:
    place = gpu_of(machine) or f"{machine['cores']} cores of {machine['processor']}"
    return f"{place}, torch {machine['versions'].get('torch', '?')}"


def _gib(size: int | None) -> float | str:
    return round(size / 2**30, 3) if size else ""
