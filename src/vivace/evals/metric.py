"""One measured figure, and how many of them are shown: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from vivace.evals.accuracy import Accuracy
from vivace.evals.interval import bootstrap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure: a row of the table, an object of the JSON."""

    name: str  # "caption accuracy", "PSNR"
    of: str = ""  # what it is a figure of: "2 objects", "fewer steps: 10"
    value: float
    unit: str = ""  # "%", "dB"; a bare number has none
    low: float | None = None  # ends of the 95 % interval
    high: float | None = None
    worst: float | None = None  # of the samples the value is the mean of
    tail: float | None = None  # the sample that 5 % of them are worse than
    count: int | None = None  # samples behind the value

    @classmethod
    def accuracy(cls, name: str, accuracy: Accuracy, *, of: str = "") -> Metric:
        """An accuracy in per cent, with Wilson's interval."""
        low, high = (100 * end for end in accuracy.interval)
        return cls(name=name, of=of, value=100 * accuracy.share, unit="%", low=low, high=high, count=accuracy.total)

    @classmethod
    def mean(
        cls, name: str, values: torch.Tensor, *, better: Literal["higher", "lower"], of: str = "", unit: str = ""
    ) -> Metric:
        """The mean of per-sample `values` [N], its bootstrap interval (from two samples on), the worst and the tail."""
        values = values.detach().double().cpu()
        low, high = bootstrap(values) if len(values) > 1 else (None, None)
        return cls(
            name=name,
            of=of,
            value=values.mean().item(),
            unit=unit,
            low=low,
            high=high,
            worst=(values.min() if better == "higher" else values.max()).item(),
            tail=values.quantile(0.05 if better == "higher" else 0.95).item(),
            count=len(values),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that were measured."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, "")}


def table(metrics: Sequence[Metric], *, title: str = "") -> Table:
    """A rich table, one row a metric; columns that no metric fills are left out."""
    columns = {
        "metric": [m.name for m in metrics],
        "of": [m.of for m in metrics],
        "value": [f"{_number(m.value)} {m.unit}".rstrip() for m in metrics],
        "95 % interval": ["" if m.low is None else f"{_number(m.low)} to {_number(m.high)}" for m in metrics],
        "5 % worse than": [_number(m.tail) for m in metrics],
        "worst": [_number(m.worst) for m in metrics],
        "samples": ["" if m.count is None else f"{m.count:,}" for m in metrics],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    shown = Table(title=title or None)
    for name in filled:
        shown.add_column(name, justify="left" if name in ("metric", "of") else "right")
    for row in zip(*filled.values(), strict=True):
        shown.add_row(*row)
    return shown


def to_json(metrics: Sequence[Metric], *, about: Mapping[str, Any] | None = None) -> str:
    """`{**about, "metrics": [...]}`; `about` holds the command, the machine, the settings.

    Raises ValueError where a figure is not finite: JSON has no word for it, and neither has a comparison.
    """
    document = {**(about or {}), "metrics": [metric.to_dict() for metric in metrics]}
    return json.dumps(document, indent=2, allow_nan=False)


def _number(value: float | None) -> str:
    """Four significant digits, without an exponent where the number can be read without one."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:#.4g}".rstrip(".")
