import io
import json
import math

import pytest
import torch
from rich.console import Console

from vivace.evals.accuracy import Accuracy
from vivace.evals.metric import Metric, table, to_json


def shown(metrics: list[Metric]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(metrics, title="quality"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_accuracy_is_in_per_cent_with_its_interval():
    metric = Metric.accuracy("caption accuracy", Accuracy(right=81, total=263), of="2 objects")
    assert metric.value == pytest.approx(30.8, abs=0.01)
    assert (metric.low, metric.high) == pytest.approx((25.53, 36.62), abs=0.01)
    assert "30.80 %" in shown([metric])
    assert "25.53 to 36.62" in shown([metric])


def test_mean_tells_the_worst_and_the_tail_on_the_bad_side():
    values = torch.arange(101.0)
    high, low = (Metric.mean("x", values, better=better) for better in ("higher", "lower"))
    assert (high.value, high.worst, high.tail) == pytest.approx((50, 0, 5))
    assert (low.value, low.worst, low.tail) == pytest.approx((50, 100, 95))
    assert high.low < 50 < high.high
    assert Metric.mean("x", values[:1], better="lower").low is None


def test_empty_columns_are_not_shown():
    text = shown([Metric(name="FID", value=1.2345678)])
    assert "1.235" in text
    assert "interval" not in text
    assert "samples" not in text


def test_small_large_and_round_numbers_are_readable():
    text = shown([Metric(name="a", value=v) for v in (1.5e-7, 0.0, 20.0, 1234.0, 123456.0)])
    for number in ("1.5e-07", "0.0", "20.00", "1234", "1.235e+05"):
        assert number in text


def test_json_holds_what_was_measured_and_nothing_else():
    document = json.loads(to_json([Metric(name="FID", value=0.0, count=10)], about={"steps": 28}))
    assert document == {"steps": 28, "metrics": [{"name": "FID", "value": 0.0, "count": 10}]}
    with pytest.raises(ValueError, match="JSON"):
        to_json([Metric(name="PSNR", value=math.inf)])
