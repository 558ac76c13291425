"""The calibrations that ship: they are the built-in model's own, and they run."""

import pytest

import vivace
from vivace.cache.calibration import SHIPPED, fingerprint, read


@pytest.fixture(scope="module")
def pipe():
    found = vivace.load("builtin", device="cpu")
    found.set_progress_bar_config(disable=True)
    return found


def test_every_file_is_a_calibration():
    assert list(SHIPPED.glob("*.json")), "none ships; make calibrations writes them"
    for path in SHIPPED.glob("*.json"):
        found = read(path)
        for plan in found.plans:
            assert plan.compute[0] == 0
            assert set(plan.compute) | set(plan.weights) == set(range(plan.steps))


def test_the_built_in_models(pipe):
    own = read(SHIPPED / "builtin.json")
    assert own.denoiser == fingerprint(pipe.transformer)
    scheduler = type(pipe.scheduler).__name__
    computed = [len(plan.compute) for plan in own.plans if (plan.steps, plan.scheduler) == (28, scheduler)]
    assert len(computed) >= 4
    assert min(computed) <= 28 / 4
    assert own.teacache is not None
    assert own.firstblock


@pytest.mark.parametrize("spelled", ["planned:computed=0.36", "teacache"])
def test_the_built_in_model_runs_with_them(pipe, spelled, last):
    vivace.accelerate(pipe, cache=spelled)
    try:
        pipe("a red circle", num_inference_steps=28, guidance_scale=3.0, height=64, width=64, output_type="latent")
        assert 0.2 < last(pipe)["hit_rate"] < 0.9
    finally:
        vivace.restore(pipe)
