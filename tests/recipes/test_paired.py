"""Rows beside exact: the paired difference, and times held against exact's of the row's own run."""

import pytest

from vivace.accelerate import acceleration_of
from vivace.attention import cudnn_fp8
from vivace.config import PRESETS
from vivace.errors import InputError
from vivace.families import FAMILIES


@pytest.fixture
def rows():
    shared = {"steps": 28, "evaluations": 28.0, "accuracy": 0.0, "interval": [], "fid": None, "psnr_worst": 9.0}
    exact = {"name": "exact", "role": "exact", "seconds": 2.0, "exact_seconds": 2.0, "right": "1" * 400, "psnr": 100.0}
    # Measured on a machine that was half as fast.
    fp8 = {"name": "fp8", "role": "bits", "seconds": 2.0, "exact_seconds": 4.0, "right": "1" * 400, "psnr": 40.0}
    poor = {**fp8, "name": "poor", "right": "1" * 380 + "0" * 20}
    return [{**shared, **row, "exact_right": exact["right"]} for row in (exact, fp8, poor)]


def test_few_bits_are_held_to_a_point(recipe, rows):
    exact, fp8, poor = recipe("bits").judged(rows)
    assert (exact["speedup"], fp8["speedup"]) == (1.0, 2.0)
    assert (fp8["within_a_point"], poor["within_a_point"]) == (True, False)
    assert poor["difference"] == pytest.approx(-5)
    assert "within_a_point" not in exact
    assert "right" not in fp8
    assert fp8["exact_accuracy"] == 100


def test_a_control_is_read_at_the_share_of_exacts_time(recipe, rows):
    caches = recipe("caches")
    exact, half = rows[0], {**rows[0], "name": "half", "psnr": 30.0}
    assert caches.at_time([exact, half], {"exact": 1.0, "half": 0.5}, 0.75, "psnr") == pytest.approx((99 + 30) / 2)


def test_no_cache_is_said_to_beat_controls_that_are_still_to_be_measured(recipe, rows):
    caches = recipe("caches")
    half = {**rows[0], "name": "euler, 14 steps", "role": "control", "seconds": 1.0, "psnr": 30.0}
    cache = {**rows[0], "name": "steps", "role": "cache", "seconds": 1.0, "psnr": 20.0}
    assert caches.judged([rows[0], cache, half])[1]["beats_controls"] is False
    assert "beats_controls" not in caches.judged([rows[0], cache], complete=False)[1]


def test_a_cache_is_judged_at_the_times_of_another_device(recipe, rows):
    """Where the model is most of a picture's time the cache is as quick as a control that it is better than."""
    caches = recipe("caches")
    exact = {**rows[0], "accuracy": 95.0}
    poor = {**rows[0], "role": "control", "seconds": 1.0, "psnr": 30.0, "accuracy": 40.0}
    controls = [{**poor, "name": f"{kind}, 14 steps"} for kind in ("euler", *caches.SOLVERS)]
    cache = {**rows[0], "name": "planned", "role": "cache", "seconds": 1.8, "psnr": 35.0, "accuracy": 50.0}
    table = [exact, cache, *controls]
    assert caches.judged(table)[1]["beats_controls"] is False
    quick = dict.fromkeys(("planned", *(one["name"] for one in controls)), 0.5)
    there = recipe("cache_times").judged(table, [quick, {**quick, "planned": 0.4}, {**quick, "planned": 0.9}])[1]
    assert there["beats_controls"] is True
    assert (there["share"], there["rounds"]) == (0.5, [0.5, 0.4, 0.9])
    assert there["controls_at_its_time"]["euler"] == {"psnr": 30.0, "accuracy": 40.0}


def test_each_is_timed_beside_exact_and_leaves_the_pipeline_stock(recipe, monkeypatch):
    times, caches = recipe("cache_times"), recipe("caches")
    monkeypatch.setattr(times, "STEPS", 4)
    clock = times.Clock("cpu", batch=3)
    stock = clock.pipe.scheduler
    ((name, share),) = clock.round([caches.Contestant(solver="unipc", steps=1)])
    assert (name, len(clock.exact)) == ("unipc, 1 steps", 2)
    assert share < 0.9
    assert acceleration_of(clock.pipe) is None
    assert clock.pipe.scheduler is stock


def test_rows_outlive_a_line_that_was_cut(recipe, rows, tmp_path):
    """The next run adds its rows behind it, and the one after that reads them all."""
    kept = recipe("paired").Rows(tmp_path / "new" / "rows.jsonl", key="k")
    assert list(kept.kept()) == []
    kept.keep(rows[0])
    with kept.file.open("a") as file:
        file.write('\n{"key": "k", "name": "cu')
    kept.keep(rows[1])
    recipe("paired").Rows(kept.file, key="of another model").keep(rows[2])
    assert list(kept.kept()) == rows[:2]


def test_a_row_is_held_against_exact_of_its_own_run(recipe, rows, tmp_path):
    """A later one, whose kernels round in another way, has other captions right."""
    kept = recipe("paired").Rows(tmp_path / "rows.jsonl", key="k")
    exact, fp8, poor = rows
    later = {**exact, "right": poor["right"]}
    for row in (exact, fp8, later, {**poor, "exact_right": later["right"]}):
        kept.keep(row)
    assert [recipe("paired").beside_exact(row)["difference"] for row in kept.kept()] == [0, 0, 0, 0]


def test_every_way_is_a_configuration_that_is_made_or_refused_for_this_device(recipe):
    """Each as its presets have it, and the pipeline is stock again behind it."""
    bits, bench = recipe("bits"), object.__new__(recipe("paired").Bench)
    bench.pipe = FAMILIES["sd3"].tiny()
    bench.pipe.set_progress_bar_config(disable=True)
    made, refused = {}, {}
    for name, config in bits.WAYS.items():
        try:
            with bits.in_bits(bench, config) as computed:
                bench.pipe("a circle", num_inference_steps=5, height=64, width=64, output_type="latent")
                assert computed(5) == 5
                made[name] = acceleration_of(bench.pipe).target.config
        except InputError as error:
            refused[name] = str(error)
        assert acceleration_of(bench.pipe) is None
        assert cudnn_fp8.KEYS == 1024
    assert {"int8", "balanced", "fast"} <= made.keys()
    assert made == {name: bits.WAYS[name] for name in made}
    assert (made["balanced"], made["fast"]) == (PRESETS["balanced"], PRESETS["fast"])
    assert all("cannot be done here" in error for error in refused.values())
