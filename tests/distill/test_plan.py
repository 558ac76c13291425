"""The plan: expected teacher calls against the formula, memory counted, nothing written."""

from dataclasses import replace

import pytest

from vivace.config import PRESETS, Config
from vivace.distill import Stage, Student
from vivace.distill import plan as plans
from vivace.distill.objective import Objective
from vivace.distill.plan import make_plan, student_calls, teacher_calls
from vivace.families import FAMILIES


def test_teacher_calls(config):
    stage = Stage(batches=1, steps=4)
    # modes at every index, each smeared by exp(-2) onto its neighbours: 4, 3, 2, 1 calls from index 0, 1, 2, 3
    assert teacher_calls(config(), stage) == pytest.approx(2.5)
    assert teacher_calls(config(timesteps="uniform"), stage) == pytest.approx(2.5)
    assert teacher_calls(config(method="consistency"), stage) == 1
    assert teacher_calls(config(), replace(stage, distillation=0.0, matching=1.0)) == 0


def test_student_calls(config):
    stage = Stage(batches=1, steps=4, simulated=0.5)
    # no call before index 0, then 1, 2 and 3
    assert student_calls(config(), stage) == pytest.approx(0.5 * 1.5)
    assert student_calls(config(), replace(stage, modes=(0, 0, 0, 1.0))) == pytest.approx(0.5 * 2.88, abs=0.01)
    assert student_calls(config(), replace(stage, simulated=0.0)) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plan_takes_the_same_share_of_simulated_starts_whatever_is_drawn(config, tmp_path, monkeypatch, seed):
    """One batch would have none of the student's calls, or all that can be."""
    seen, simulated = [], Objective.simulated
    monkeypatch.setattr(
        Objective, "simulated", lambda self, *a, **kw: seen.append(len(a[1])) or simulated(self, *a, **kw)
    )
    stage = Stage(batches=1, steps=4, guidance=(2.0, 4.0), simulated=0.5)
    make_plan(config(tmp_path / "out", stages=(stage,), seed=seed), pipe=FAMILIES["sd3"].tiny())
    assert seen == [3, 3]  # levels of one step: while warming up, and measured


def test_a_plan_measures_every_stage_and_writes_nothing(config, tmp_path):
    chosen = config(tmp_path / "out", student=Student(rank=4, ema=0.9))
    plan = make_plan(chosen, pipe=FAMILIES["sd3"].tiny())
    assert [stage.batches for stage in plan.stages] == [2, 8]
    assert all(stage.seconds > 0 and 0 < stage.rollout < 1 for stage in plan.stages)
    assert plan.hours == pytest.approx(sum(s.batches * s.seconds for s in plan.stages) / 3600)
    transformer = FAMILIES["sd3"].tiny().transformer
    assert plan.memory["transformer"] == sum(
        4 * tensor.numel() for tensor in (*transformer.parameters(), *transformer.buffers())
    )
    assert plan.memory["its gradients and AdamW's moments"] == 3 * plan.memory["student"]
    assert plan.memory["running mean"] == plan.memory["student"]
    assert plan.to_dict()["hours"] == plan.hours
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_weights_beside_a_quantised_teacher(config, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "balanced", Config(quant="int8"))
    exact, quantised = (
        make_plan(config(tmp_path, accelerate=preset), pipe=FAMILIES["sd3"].tiny()).memory
        for preset in ("exact", "balanced")
    )
    assert quantised["transformer"] < exact["transformer"]
    assert "weights in 16 bit, of a teacher in 8" not in exact
    assert quantised["weights in 16 bit, of a teacher in 8"] > exact["transformer"] / 4


def test_a_plan_makes_the_moments_that_the_most_memory_has(config, tmp_path, monkeypatch):
    seen = []
    measured = plans._measure
    monkeypatch.setattr(
        plans, "_measure", lambda training, *a, **kw: seen.append(training) or measured(training, *a, **kw)
    )
    make_plan(config(tmp_path / "out"), pipe=FAMILIES["sd3"].tiny())
    moments = [
        sum(value.numel() for state in learner.optimizer.state.values() for value in state.values() if value.ndim)
        for learner in seen[-1].learners.values()
    ]
    trained = [
        sum(one.numel() for group in learner.optimizer.param_groups for one in group["params"] if one.ndim)
        for learner in seen[-1].learners.values()
    ]
    assert len(moments) == 2
    assert moments == [2 * count for count in trained]


def test_a_cpu_measures_small_batches(config, tmp_path, monkeypatch):
    seen = []
    measured = plans._measure
    monkeypatch.setattr(
        plans, "_measure", lambda training, *a, **kw: seen.append(training.config.batch) or measured(training, *a, **kw)
    )
    plan = plans.make_plan(config(tmp_path / "out", batch=64), pipe=FAMILIES["sd3"].tiny())
    assert seen == [plans.CPU_BATCH] * 2
    assert [stage.pictures_per_second * stage.seconds for stage in plan.stages] == pytest.approx([64, 64])
