"""The stage schedule and the timestep mixture, against the paper's formula written out."""

import math

import pytest

from vivace.distill import Stage
from vivace.distill.stages import mixture, stage_at, steps_before


def test_stages_follow_each_other_and_the_last_one_stays():
    stages = [Stage(batches=3), Stage(batches=2), Stage(batches=4)]
    assert [stage_at(stages, batch) for batch in range(11)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.4, 0.2, 0.2, 0.2)])
def test_mixture_is_the_formula(weights):
    steps, variance = 32, 0.5
    raw = [
        sum(w * math.exp(-((i - m * steps // 4) ** 2) / variance) for m, w in enumerate(weights)) for i in range(steps)
    ]
    expected = [value / sum(raw) for value in raw]
    found = mixture(Stage(batches=1, steps=steps, modes=weights))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert float(found.sum()) == pytest.approx(1)


def test_mass_lies_at_the_steps_of_a_four_step_sampler():
    found = mixture(Stage(batches=1, steps=32, modes=(0.25,) * 4))
    # exp(-1 / 0.5) of a mode's mass stands on either side of it; the first has one side only
    assert found[[0, 8, 16, 24]].sum() > 0.78
    assert int(found.argmax()) == 0


def test_other_ways_to_draw():
    stage = Stage(batches=1, steps=8)
    assert mixture(stage, kind="uniform").tolist() == pytest.approx([1 / 8] * 8)
    gauss = [math.exp(-((i - 4) ** 2) / 8) for i in range(8)]
    assert mixture(stage, kind="gaussian").tolist() == pytest.approx([value / sum(gauss) for value in gauss])


def test_steps_before_are_those_of_a_four_step_sampler():
    stage = Stage(batches=1, steps=28)
    assert [steps_before(stage, index) for index in (0, 1, 6, 7, 8)] == [[], [], [0], [0], [0]]
    assert [steps_before(stage, index) for index in (14, 21, 27)] == [[0, 7], [0, 7, 14], [0, 7, 14, 21]]
