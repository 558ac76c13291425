"""The LoRA benchmark, on a tiny model."""

import json
import math

import pytest

from vivace.bench import lora
from vivace.bench.results import code
from vivace.machine import machine


def test_every_figure_is_there():
    result = lora.run(tiny=True, peer=False)
    for mode in ("merged", "side"):
        row = result["rows"][mode]
        assert row["same_as_fresh_load"]
        assert len(row["allocated_after_each_swap"]) == lora.SWAPS
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert row["step_s"] > 0
    assert result["file_bytes"][0] > 0


@pytest.mark.gpu
def test_memory_is_flat_on_a_gpu():
    rows = lora.run(tiny=True, peer=False)["rows"]
    for mode in ("merged", "side"):
        assert len(set(rows[mode]["allocated_after_each_swap"][1:])) == 1


def test_rows_are_kept_as_they_come_and_not_measured_twice(tmp_path, monkeypatch):
    path = tmp_path / "lora.json"
    monkeypatch.setattr(lora, "MODES", ("side",))
    monkeypatch.setattr(lora.Bench, "hotswap", lambda self: 1 / 0)  # what ends a run midway
    with pytest.raises(ZeroDivisionError):
        lora.main(["--tiny", "-o", str(path)])
    first = json.loads(path.read_text())
    assert list(first["rows"]) == ["side"]
    assert first["machine"]["versions"]["torch"]
    monkeypatch.setattr(lora.Bench, "hotswap", lambda self: {"cold_s": 1.0})
    lora.main(["--tiny", "-o", str(path)])
    again = json.loads(path.read_text())["rows"]
    assert again == {**first["rows"], lora.PEER: {"cold_s": 1.0}}


def test_rows_of_another_machine_or_model_are_not_taken_for_this_ones(tmp_path, capsys):
    """They would stand under this run's header."""
    path = tmp_path / "lora.json"
    here = {"command": f"{lora.COMMAND} --tiny", "machine": machine(), "code": code(), "rows": {}}
    for other in (
        {**here, "command": lora.COMMAND},
        {**here, "machine": {**machine(), "gpus": [{"name": "another GPU"}]}},
        {**here, "code": "of older files"},
    ):
        before = json.dumps(other)
        path.write_text(before)
        with pytest.raises(SystemExit) as ended:
            lora.main(["--tiny", "-o", str(path)])
        assert ended.value.code == 2
        assert "name another -o" in capsys.readouterr().err
        assert path.read_text() == before
