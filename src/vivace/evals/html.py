"""A report in one file: the table, the plot and the pictures, to be read in any browser and without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vivace.evals.sheet import fitted
from vivace.evals.verdict import Verdict

THUMBNAIL = 160  # pixels
SHOWN = 24  # prompts with pictures

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #212529; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p.about { color: #868e96; margin: .2rem 0 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #e9ecef; white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child, td.words { text-align: left; }
tr.candidate td:first-child { color: #d9480f; font-weight: 600; }
tr.control, tr.floor { color: #868e96; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; max-width: 60rem; }
table.pictures td, table.pictures th { padding: .25rem; text-align: left; vertical-align: top; border: 0; }
table.pictures td:first-child { width: 11rem; white-space: normal; color: #495057; font-size: .85rem; }
img { display: block; border-radius: 3px; outline: 1px solid #e9ecef; }
"""


def page(
    verdicts: Sequence[Verdict],
    *,
    title: str,
    about: Mapping[str, Any],
    plot: str,
    rows: Sequence[tuple[str, Sequence[Path]]],
    columns: Sequence[str],
) -> str:
    """The report. `plot` is SVG, `rows` are prompts with their pictures under `columns`."""
    said = " · ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in about.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1><p class="about">{said}</p>
<div class="wide">{_table(verdicts)}</div>
<h2>Speed and distance from the reference</h2>{plot}
<h2>Pictures</h2><div class="wide">{_pictures(rows, columns)}</div>
</body></html>
"""


def _table(verdicts: Sequence[Verdict]) -> str:
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict.distances))
    means = "".join(f"<th>{escape(name)}</th><th>5 %</th><th>worst</th>" for name in names)
    whole = list(dict.fromkeys(metric.name for verdict in verdicts for metric in verdict.dataset))
    means += "".join(f"<th>{escape(name)}</th>" for name in whole)
    head = f"<tr><th></th><th>s a picture</th><th>speed</th><th>calls computed</th>{means}<th></th></tr>"
    return f"<table>{head}{''.join(_row(verdict, names, whole) for verdict in verdicts)}</table>"


def _row(verdict: Verdict, names: Sequence[str], whole: Sequence[str]) -> str:
    """`names` have a value a prompt, `whole` one for all pictures together."""
    by_name = {metric.name: metric for metric in verdict.metrics}
    cells = [
        escape(verdict.contestant.name),
        "" if verdict.seconds is None else f"{verdict.seconds:.3g}",
        "" if verdict.speedup is None else f"{verdict.speedup:.2f}×",
        "" if verdict.computed is None else f"{verdict.computed:.0%}",
    ]
    for name in names:
        metric = by_name.get(name)
        found = ("", "", "") if metric is None else (metric.value, metric.tail, metric.worst)
        cells += [value if isinstance(value, str) or value is None else f"{value:.4g}" for value in found]
    cells += [f"{by_name[name].value:.4g}" for name in whole]
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{verdict.contestant.role}">{inside}<td class="words">{escape(verdict.wins)}</td></tr>'


def _pictures(rows: Sequence[tuple[str, Sequence[Path]]], columns: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = []
    for prompt, pictures in rows[:SHOWN]:
        cells = "".join(f'<td><img alt="" width="{THUMBNAIL}" src="{_inline(path)}"></td>' for path in pictures)
        body.append(f"<tr><td>{escape(prompt)}</td>{cells}</tr>")
    return f'<table class="pictures"><tr><th></th>{head}</tr>{"".join(body)}</table>'


def _inline(path: Path) -> str:
    """A thumbnail inside the page."""
    buffer = io.BytesIO()
    fitted(path, THUMBNAIL).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
