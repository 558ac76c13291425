"""The ablation's variants of the ready config: each leaves out what its name says, and is a config that trains."""

import pytest

from vivace.distill import read_config


@pytest.fixture(scope="module")
def ablate(distill_recipe):
    return distill_recipe("ablate")


@pytest.fixture(scope="module")
def ready():
    return read_config("builtin")


def test_what_the_names_say(ablate, ready):
    made = {name: change(ready) for name, change in ablate.VARIANTS.items()}
    assert made["all"] == ready
    assert not any(stage.distillation for stage in made["without-distillation"].stages)
    assert not any(stage.matching for stage in made["without-matching"].stages)
    assert not any(stage.adversarial for stage in made["without-adversary"].stages)
    assert {(s.matching, s.adversarial, s.distillation) for s in made["distillation-only"].stages} == {(0.0, 0.0, 1.0)}
    assert ready.critic is not None
    assert [made[name].critic for name in ("without-critic", "without-matching", "consistency")] == 3 * [None]
    assert made["uniform-times"].timesteps == "uniform"
    assert made["consistency"].method == "consistency"
    # Nothing else gets a budget of its own, but for the stage that would weigh nothing.
    first = ready.stages[0].batches
    assert {name: ready.batches - one.batches for name, one in made.items() if one.batches != ready.batches} == {
        "without-distillation": first
    }


def test_a_shorter_training_rises_falls_and_remembers_for_as_much_less(ablate, ready):
    short = ablate.shortened(ready, 0.1)
    assert [stage.batches for stage in short.stages] == [15, 25, 40, 150]
    assert (short.optimizer.warmup, short.optimizer.decay) == (5, 150)
    assert short.student.ema == pytest.approx(ready.student.ema**10)
    assert [stage.batches for stage in ablate.shortened(ready, 0.001).stages] == [1, 1, 1, 2]
