"""Schedulers by name."""

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.scheduler import scheduler_class, use_scheduler


@pytest.mark.parametrize(
    ("name", "prediction", "expected"),
    [
        ("euler", "epsilon", EulerDiscreteScheduler),
        ("Euler", "flow", FlowMatchEulerDiscreteScheduler),
        ("EulerDiscreteScheduler", "v", EulerDiscreteScheduler),
        ("euler-a", "epsilon", EulerAncestralDiscreteScheduler),
        ("ddim", "epsilon", DDIMScheduler),
        ("dpm++", "epsilon", DPMSolverMultistepScheduler),
        ("unipc", "flow", UniPCMultistepScheduler),
    ],
)
def test_names(name, prediction, expected):
    assert scheduler_class(name, prediction=prediction) is expected


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match=r"no scheduler 'eular'; the nearest are EulerDiscreteScheduler \(euler\)"):
        scheduler_class("eular", prediction="epsilon")


def test_the_noise_schedule_is_kept():
    pipe = FAMILIES["sdxl"].tiny()
    use_scheduler(pipe, "ddim", prediction="epsilon")
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.config["beta_start"] == 0.00085
    with pytest.raises(InputError, match="is for flow models"):
        use_scheduler(pipe, "flowmatcheuler", prediction="epsilon")
    with pytest.raises(InputError, match="cannot run a flow model"):
        use_scheduler(pipe, "ddim", prediction="flow")


@pytest.mark.parametrize("name", ["karrasve", "amused", "repaint", "vqdiffusion", "scm", "heliosdmd"])
def test_what_is_made_for_other_loops_is_refused(name):
    with pytest.raises(InputError, match=r"cannot run here: .*; use euler"):
        scheduler_class(name, prediction="epsilon")


@pytest.mark.parametrize("name", ["heun", "pndm", "lcm", "sasolver", "kdpm2", "flowmatchheun"])
def test_what_a_loop_can_step_is_taken(name):
    assert scheduler_class(name, prediction="flow" if "flow" in name else "epsilon")


def test_a_noise_schedule_that_a_scheduler_does_not_take():
    with pytest.raises(InputError, match="UnCLIPScheduler does not take this model's noise schedule"):
        use_scheduler(FAMILIES["sdxl"].tiny(), "unclip", prediction="epsilon")
