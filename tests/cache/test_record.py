"""What a scheduler alone does with a denoiser's outputs is known after one recorded run."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from vivace.cache.record import Run, recorded


def run_of(scheduler, *, seed: int) -> Run:
    """A run of six steps on random outputs, always from the same latents and with the same noise."""
    scheduler.set_timesteps(6)
    noise, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    sample = torch.ones(1, 2, 3, 3)
    extra = {"generator": noise} if isinstance(scheduler, EulerAncestralDiscreteScheduler) else {}
    with recorded(scheduler, outputs=True) as run:
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
            output = torch.randn(sample.shape, generator=draw)
            sample = scheduler.step(output, timestep, sample, return_dict=False, **extra)[0]
    return run


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        DPMSolverMultistepScheduler(),
        EulerAncestralDiscreteScheduler(),
        EulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        HeunDiscreteScheduler(),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_effects_say_what_other_outputs_would_have_made(scheduler):
    one, other = run_of(scheduler, seed=1), run_of(scheduler, seed=2)
    effects = one.effects()
    changed = sum(e * (b - a) for e, a, b in zip(effects, one.outputs, other.outputs, strict=True))
    torch.testing.assert_close(other.latents - one.latents, changed, rtol=1e-2, atol=2e-3)
    assert changed.norm() > 0.1


def test_a_flow_models_effects_are_its_steps_in_noise():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    effects = run_of(scheduler, seed=1).effects()
    assert effects == pytest.approx(scheduler.sigmas.diff().tolist())


def test_the_scheduler_is_as_it_was():
    scheduler = UniPCMultistepScheduler()
    run_of(scheduler, seed=1).effects()
    assert "step" not in vars(scheduler)
    assert scheduler.step_index == 6
