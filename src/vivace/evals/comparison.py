"""Presets and caches compared on prompts, from the drawings to the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivace.config import Config
from vivace.evals import html, plot
from vivace.evals.contest import Contest, Contestant, contestants, controls_of
from vivace.evals.instruments import Instruments
from vivace.evals.sheet import sheet
from vivace.evals.verdict import Verdict, judge


@dataclass(frozen=True, kw_only=True)
class Written:
    """The files of a comparison."""

    verdicts: list[Verdict]
    report: Path
    sheet: Path
    metrics: Path


def draw_all(
    contest: Contest, *, presets: Sequence[str], configs: Mapping[str, Config]
) -> tuple[Contestant, list[Contestant]]:
    """Every contestant draws every prompt: the reference, the floor, the candidates, and the controls they call for.

    Raises InputError for a candidate that cannot be before anything is drawn.
    """
    reference, candidates = contestants(presets=presets, configs=configs, steps=contest.steps)
    for candidate in candidates:
        contest.check(candidate)
    contest.run(reference)
    others = [contest.floor(reference), *candidates]
    for candidate in candidates:
        contest.run(candidate)
    controls = controls_of(contest, reference, candidates)
    for control in controls:
        contest.run(control)
    return reference, [*others, *controls]


def write_all(
    contest: Contest,
    reference: Contestant,
    others: Sequence[Contestant],
    *,
    instruments: Instruments | None = None,
    about: Mapping[str, Any],
) -> Written:
    """The verdicts as JSON, CSV, plot, contact sheet and one HTML page in the contest's folder."""
    verdicts = judge(contest, reference, others, instruments=instruments)
    folder = contest.store.folder
    metrics = folder / "metrics.json"
    document = {**about, "verdicts": [verdict.to_dict() for verdict in verdicts]}
    metrics.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _csv(verdicts, contest, folder / "metrics.csv")
    columns = [v.contestant for v in verdicts if v.contestant.role in ("reference", "candidate", "control")]
    rows = [
        (prompt, [contest.store.picture(column.name, index) for column in columns])
        for index, prompt in enumerate(contest.prompts)
    ]
    names = [column.name for column in columns]
    picture = folder / "contact_sheet.png"
    sheet(rows, columns=names).save(picture)
    canvas = chart(verdicts)
    plot.save(canvas, folder / "speed_quality.png")
    report = folder / "report.html"
    title = f"{contest.model}: {', '.join(v.contestant.name for v in verdicts if v.contestant.role == 'candidate')}"
    report.write_text(
        html.page(verdicts, title=title, about=_short(about), plot=canvas.svg, rows=rows, columns=names),
        encoding="utf-8",
    )
    return Written(verdicts=verdicts, report=report, sheet=picture, metrics=metrics)


def chart(verdicts: Sequence[Verdict], *, front: Sequence[str] = ()) -> plot.Canvas:
    """Speed-up against PSNR, with the floor as a level."""
    points = [
        plot.Point(
            name=verdict.contestant.name, role=verdict.contestant.role, x=verdict.speedup,
            y=verdict.distances["PSNR"].mean().item(),
        )
        for verdict in verdicts
        if verdict.speedup is not None and "PSNR" in verdict.distances
    ]  # fmt: skip
    floors = [v.distances["PSNR"].mean().item() for v in verdicts if v.contestant.role == "floor"]
    level = ("noise floor", min(floors)) if floors else None
    return plot.scatter(
        points, title="Further right is faster, higher is closer to the reference", x="times as fast as the reference",
        y="PSNR, dB", front=front, level=level,
    )  # fmt: skip


def _csv(verdicts: Sequence[Verdict], contest: Contest, path: Path) -> None:
    """One line a contestant and prompt."""
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict.distances))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["contestant", "role", "prompt", "seconds", *names])
        for verdict in verdicts:
            for place, record in enumerate(contest.of(verdict.contestant)):
                values = [verdict.distances[n][place].item() if n in verdict.distances else "" for n in names]
                writer.writerow(
                    [verdict.contestant.name, verdict.contestant.role, record.prompt, record.seconds, *values]
                )


def _short(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if isinstance(value, str | int | float)}
