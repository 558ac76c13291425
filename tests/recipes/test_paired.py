"""Rows beside exact: the paired difference, and times held against exact's of the row's own run."""

import pytest


@pytest.fixture
def rows():
    shared = {"steps": 28, "evaluations": 28.0, "accuracy": 0.0, "interval": [], "fid": None, "psnr_worst": 9.0}
    exact = {"name": "exact", "role": "exact", "seconds": 2.0, "exact_seconds": 2.0, "right": "1" * 400, "psnr": 100.0}
    # Measured on a machine that was half as fast.
    fp8 = {"name": "fp8", "role": "bits", "seconds": 2.0, "exact_seconds": 4.0, "right": "1" * 400, "psnr": 40.0}
    poor = {**fp8, "name": "poor", "right": "1" * 380 + "0" * 20}
    return [{**shared, **row} for row in (exact, fp8, poor)]


def test_few_bits_are_held_to_a_point(recipe, rows):
    exact, fp8, poor = recipe("bits").judged(rows)
    assert (exact["speedup"], fp8["speedup"]) == (1.0, 2.0)
    assert (fp8["within_a_point"], poor["within_a_point"]) == (True, False)
    assert poor["difference"] == pytest.approx(-5)
    assert "within_a_point" not in exact
    assert "right" not in fp8


def test_a_control_is_read_at_the_share_of_exacts_time(recipe, rows):
    caches = recipe("caches")
    half = {**rows[0], "seconds": 1.0, "psnr": 30.0}
    assert caches.at_time([rows[0], half], 0.75, "psnr") == pytest.approx((99 + 30) / 2)
