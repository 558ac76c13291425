"""The solver against stock schedulers that follow the same denoiser."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from vivace.distill.levels import levels_of
from vivace.distill.solver import rollout, solver_of
from vivace.distill.view import DENOISED

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some smooth denoiser, of whatever it predicts."""
    return torch.tanh(x + 0.3 * torch.sin(t / 300).view(-1, 1, 1, 1))


def follow(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


def ours(scheduler: Any, x: torch.Tensor, *, solver: Any, steps: int, start: int = 0) -> torch.Tensor:
    prediction, levels = levels_of(scheduler)

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        wide: Callable[..., torch.Tensor] = lambda value: value.float().view(-1, 1, 1, 1)  # noqa: E731
        return DENOISED[prediction](output(x, levels.time(sigma)), x, wide(levels.alpha(sigma)), wide(sigma))

    return rollout(x, levels.grid(steps)[start:], denoised, levels=levels, solver=solver)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_is_ddim(prediction):
    scheduler = DDIMScheduler(
        **NOISE, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(8)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(follow(scheduler, x), ours(scheduler, x, solver="euler", steps=8), atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_multistep_is_dpm_solver(prediction):
    scheduler = DPMSolverMultistepScheduler(
        **NOISE, prediction_type=prediction, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(8)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(follow(scheduler, x), ours(scheduler, x, solver="multistep", steps=8), atol=1e-3)


def test_euler_is_flow_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(follow(scheduler, x), ours(scheduler, x, solver="euler", steps=8), atol=1e-5)


def test_multistep_runs_from_pure_noise_of_a_flow():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    coarse, fine = (ours(scheduler, x, solver="multistep", steps=steps) for steps in (64, 512))
    euler = ours(scheduler, x, solver="euler", steps=64)
    assert coarse.isfinite().all()
    # second order is nearer to the limit than first order
    assert (coarse - fine).abs().max() < 0.2 * (euler - fine).abs().max()


def test_a_rollout_can_start_anywhere_on_the_grid():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = x
    for t in scheduler.timesteps[5:]:
        expected = scheduler.step(output(expected, t.expand(1)), t, expected, return_dict=False)[0]
    assert torch.allclose(expected, ours(scheduler, x, solver="euler", steps=8, start=5), atol=1e-5)


def test_auto():
    assert solver_of("auto", levels_of(FlowMatchEulerDiscreteScheduler())[1]) == "euler"
    assert solver_of("auto", levels_of(DDIMScheduler(**NOISE))[1]) == "multistep"
    assert solver_of("euler", levels_of(DDIMScheduler(**NOISE))[1]) == "euler"
