"""The few-step scheduler of flow models."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from vivace.families import FAMILIES
from vivace.few_step_flow import FewStepFlow, few_step_scheduler

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_it_steps_on_the_grid_that_students_learn():
    scheduler = few_step_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(scheduler, FewStepFlow)
    scheduler.set_timesteps(4)
    shifted = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)]
    assert scheduler.sigmas.tolist() == pytest.approx([*shifted, 0])
    scheduler.set_timesteps(sigmas=[1.0, 0.3])
    assert scheduler.sigmas.tolist() == pytest.approx([1, 3 * 0.3 / 1.6, 0])


def test_pipelines_find_the_parameters_that_stock_has():
    ours, stock = (inspect.signature(one.set_timesteps) for one in (FewStepFlow, FlowMatchEulerDiscreteScheduler))
    assert list(ours.parameters) == list(stock.parameters)


def test_a_step_is_the_picture_and_new_noise():
    scheduler = few_step_scheduler(FlowMatchEulerDiscreteScheduler())
    scheduler.set_timesteps(4)
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = 0.5 * x
    after = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    noise = (after - 0.25 * (x - velocity)) / 0.75
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise * x).mean())) < 0.03  # new, not the noise it had


def test_the_last_step_is_the_picture():
    scheduler = few_step_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler.set_timesteps(1)
    x = torch.randn(1, 4, 4, 4)
    assert torch.allclose(scheduler.step(0.3 * x, scheduler.timesteps[0], x, return_dict=False)[0], 0.7 * x)


@pytest.mark.parametrize("family", ["sd3", "flux"])  # FLUX's pipeline brings its own sigmas
def test_a_picture_depends_on_its_own_noise_only(family):
    """The seed names the picture through a stock pipeline, whatever else is in the batch and was drawn before."""
    pipe = FAMILIES[family].tiny()
    pipe.scheduler = few_step_scheduler(pipe.scheduler)

    def draw(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "latent"}
        return pipe(prompt=prompts, generator=generators, **call).images

    first = draw(["a", "b"], [1, 2])
    torch.rand(7)
    assert torch.equal(first, draw(["a", "b"], [1, 2]))
    assert torch.allclose(first[1:], draw(["b"], [2]), atol=1e-4)
    assert not torch.allclose(first[1:], draw(["b"], [3]), atol=1e-2)


def test_variance_preserving_models_get_lcm():
    for scheduler in (DDIMScheduler(**NOISE), EulerDiscreteScheduler(**NOISE)):
        found = few_step_scheduler(scheduler)
        assert type(found) is LCMScheduler
        assert not found.config.clip_sample
        for steps, times in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])):
            found.set_timesteps(steps)
            assert found.timesteps.tolist() == times


def test_the_noise_is_the_teachers_also_where_its_own_class_has_it_by_default():
    """PixArt's linear betas are DPM-Solver's defaults, and not LCM's."""
    for scheduler in (DPMSolverMultistepScheduler(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")):
        assert torch.equal(few_step_scheduler(scheduler).alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_flow_model_is_one_under_any_solver(solver):
    found = few_step_scheduler(solver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))
    assert isinstance(found, FewStepFlow)
    found.set_timesteps(4)
    assert found.sigmas.tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)])


def test_the_grid_is_the_one_that_students_are_trained_on():
    found = few_step_scheduler(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))
    found.set_timesteps(4)
    assert found.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_generator_of_the_callers_is_used():
    scheduler = few_step_scheduler(FlowMatchEulerDiscreteScheduler())
    x = torch.ones(1, 1, 4, 4)
    drawn = []
    for seed in (1, 1, 2):
        scheduler.set_timesteps(2)
        generator = torch.Generator().manual_seed(seed)
        drawn.append(scheduler.step(x, scheduler.timesteps[0], x, generator=generator, return_dict=False)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
