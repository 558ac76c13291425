"""The LoRA benchmark, on a tiny model."""

import math

import pytest

from vivace.bench import lora


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
