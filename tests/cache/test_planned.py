"""Planned runs a calibrated plan, for the model, scheduler and number of steps it was made for."""

import json

import pytest
import torch

import vivace
from vivace import InputError
from vivace.cache.calibration import fingerprint

COMPUTE = [0, 1, 2, 4, 6, 8, 11]


@pytest.fixture
def file(pipe, tmp_path):
    scheduler = type(pipe.scheduler).__name__
    plans = [
        {"steps": 12, "scheduler": scheduler, "compute": COMPUTE, "orders": {"3": 2, "5": 0}},
        {"steps": 12, "scheduler": scheduler, "compute": [0, 1, 6, 11]},
    ]
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"denoiser": fingerprint(pipe.transformer), "planned": plans}))
    return path


def test_computes_the_plans_steps(pipe, draw, last, file):
    exact = draw(pipe)
    vivace.accelerate(pipe, cache=f"planned:file={file}")
    fast = draw(pipe)
    assert last(pipe)["skipped_steps"] == [step for step in range(12) if step not in COMPUTE]
    vivace.accelerate(pipe, cache=f"planned:file={file},computed=0.3")
    faster = draw(pipe)
    assert last(pipe)["computed"] == 4
    assert 0 < (fast - exact).norm() < (faster - exact).norm()


def test_the_orders_are_the_plans(pipe, draw, file):
    vivace.accelerate(pipe, cache=f"planned:file={file}")
    planned = draw(pipe)
    text = json.loads(file.read_text())
    text["planned"][0]["orders"] = {}
    file.write_text(json.dumps(text))
    vivace.restore(pipe)
    linear = draw(vivace.accelerate(pipe, cache=f"planned:file={file}"))
    assert not torch.equal(planned, linear)
    vivace.accelerate(pipe, cache="steps:order=1,compute=" + "+".join(map(str, COMPUTE)))
    assert torch.equal(draw(pipe), linear)


def test_another_number_of_steps_is_an_error(pipe, draw, file):
    vivace.accelerate(pipe, cache=f"planned:file={file}")
    with pytest.raises(InputError, match=r"no plan for 9 steps of FlowMatchEuler.*12 steps"):
        draw(pipe, steps=9)


def test_another_shift_of_the_noise_is_an_error(pipe, draw, last, file):
    text = json.loads(file.read_text())
    pipe.scheduler.set_timesteps(12)
    for row in text["planned"]:
        row["times"] = pipe.scheduler.timesteps.tolist()
    file.write_text(json.dumps(text))
    draw(vivace.accelerate(pipe, cache=f"planned:file={file}"))
    assert last(pipe)["skipped"] == 5
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.0)
    with pytest.raises(InputError, match="at these noise levels"):
        draw(pipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoiser": "Other-123"}, "was calibrated for Other-123"),
        ({"planned": []}, "has no plan"),
        ({"planned": [{"steps": "many"}]}, "is no calibration"),
    ],
)
def test_what_is_no_calibration_of_this_model(pipe, file, change, message):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        vivace.accelerate(pipe, cache=f"planned:file={file}")


def test_no_calibration_at_all(pipe, tmp_path):
    with pytest.raises(InputError, match="make one with vivace calibrate"):
        vivace.accelerate(pipe, cache="planned")
    with pytest.raises(InputError, match="cannot read the calibration"):
        vivace.accelerate(pipe, cache=f"planned:file={tmp_path}/none.json")
