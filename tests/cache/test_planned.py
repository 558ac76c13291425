"""Planned runs a calibrated plan, for the model, scheduler and number of steps it was made for."""

import json
from dataclasses import replace

import pytest
import torch

import vivace
from vivace import InputError
from vivace.cache.calibration import fingerprint, read
from vivace.cache.record import recorded
from vivace.scheduler import use_scheduler

COMPUTE = [0, 1, 2, 4, 6, 8, 11]


def newest(compute, steps=12):
    """Weights by which every skipped step takes the last computed output."""
    return {str(step): [1.0] for step in range(steps) if step not in compute}


@pytest.fixture
def file(pipe, tmp_path):
    scheduler = type(pipe.scheduler).__name__
    plans = [
        {"steps": 12, "scheduler": scheduler, "compute": compute, "weights": newest(compute)}
        for compute in (COMPUTE, [0, 1, 6, 11])
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


def test_the_weights_are_the_plans(pipe, draw, file):
    vivace.accelerate(pipe, cache=f"planned:file={file}")
    newest_ = draw(pipe)
    vivace.accelerate(pipe, cache="steps:order=0,compute=" + "+".join(map(str, COMPUTE)))
    assert torch.equal(draw(pipe), newest_)
    text = json.loads(file.read_text())
    # Step 3 lies beside 1 and 2: the line through these.
    text["planned"][0]["weights"]["3"] = [-1.0, 2.0]
    file.write_text(json.dumps(text))
    vivace.restore(pipe)
    vivace.accelerate(pipe, cache=f"planned:file={file}")
    with recorded(pipe.scheduler, outputs=True) as run:
        draw(pipe)
    one, two, three = run.outputs[1:4]
    torch.testing.assert_close(three, 2 * two - one)


def test_weights_of_what_is_not_known_yet_are_the_newest(pipe, file):
    """As where image to image begins in the middle: `since` is its first step."""
    (plan, _) = read(file).plans
    plan = replace(plan, weights={**plan.weights, 7: (0.5, -0.5, 1.0)})
    assert plan.factors(7, since=0) == plan.factors(7, since=2) == (0.5, -0.5, 1.0)
    assert plan.factors(7, since=3) == (1.0,)


def test_plans_that_ship_in_several_files_are_put_together(pipe, draw, last, file, monkeypatch):
    """Of one model with two schedulers: each run takes its own's."""
    text = json.loads(file.read_text())
    other = {"steps": 8, "scheduler": "DPMSolverMultistepScheduler", "compute": [0, 3], "weights": newest([0, 3], 8)}
    (file.parent / "other.json").write_text(json.dumps({**text, "planned": [other]}))
    monkeypatch.setattr("vivace.cache.calibration.SHIPPED", file.parent)
    vivace.accelerate(pipe, cache="planned")
    draw(pipe)
    assert last(pipe)["computed"] == len(COMPUTE)
    stock = pipe.scheduler
    use_scheduler(pipe, "dpmsolvermultistep", prediction="flow")
    try:
        draw(pipe, steps=8)
        assert last(pipe)["computed"] == 2
    finally:
        pipe.scheduler = stock


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
        ({"planned": [{"steps": 2, "scheduler": "Euler", "compute": [0], "weights": {}}]}, "weights for every step"),
        ({"planned": [{"steps": 2, "scheduler": "Euler", "compute": [0], "weights": {"1": [1, 2]}}]}, "at most 3"),
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
