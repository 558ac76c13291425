"""Noise levels against stock schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from vivace.distill.levels import Straight, VariancePreserving, levels_of
from vivace.errors import InputError

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_variance_preserving_grid_is_stock_trailing():
    scheduler = DDIMScheduler(**NOISE, timestep_spacing="trailing", clip_sample=False)
    prediction, levels = levels_of(scheduler)
    assert prediction == "epsilon"
    assert isinstance(levels, VariancePreserving)
    for steps in (32, 16, 4):
        scheduler.set_timesteps(steps)
        grid = levels.grid(steps)
        assert levels.time(grid[:-1]).tolist() == scheduler.timesteps.tolist()
        assert grid[-1] == 0
        alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
        assert torch.allclose(levels.alpha(grid[:-1]) ** 2, alphas, atol=1e-7)


def test_every_timestep_is_found_again():
    _, levels = levels_of(EulerDiscreteScheduler(**NOISE))
    assert isinstance(levels, VariancePreserving)
    assert levels.time(levels.table).tolist() == list(range(1000))


def test_modes_are_the_steps_of_the_few_step_sampler():
    scheduler = LCMScheduler(**NOISE, original_inference_steps=1000)
    _, levels = levels_of(scheduler)
    scheduler.set_timesteps(4)
    assert levels.time(levels.grid(32)[[0, 8, 16, 24]]).tolist() == scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_grid_is_stock_shift(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    prediction, levels = levels_of(scheduler)
    assert prediction == "flow"
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    assert levels.grid(8).tolist() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert levels.time(levels.grid(8)[:-1]).tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_stock(kind):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, time_shift_type=kind)
    _, levels = levels_of(scheduler)
    for tokens in (256, 1024, 4096):
        scheduler.set_timesteps(sigmas=[1 - i / 4 for i in range(4)], mu=calculate_shift(tokens))
        assert levels.grid(4, tokens=tokens).tolist() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_a_flow_scheduler_of_another_name():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert levels_of(scheduler) == ("flow", Straight(shift=5.0))


def test_times_between_0_and_1000():
    _, vp = levels_of(DDIMScheduler(**NOISE))
    assert isinstance(vp, VariancePreserving)
    assert vp.at(250.0) == pytest.approx(float(vp.table[250]))
    assert vp.at(1000.0) == pytest.approx(float(vp.table[999]))
    assert Straight(shift=3.0).at(500.0) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_noise_prediction_without_signal_is_refused():
    scheduler = DDIMScheduler(**NOISE, rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="terminal SNR of zero"):
        levels_of(scheduler)
    v = DDIMScheduler(**NOISE, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert levels_of(v)[0] == "v"
