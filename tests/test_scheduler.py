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
