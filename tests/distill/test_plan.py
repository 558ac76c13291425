"""The plan: expected teacher calls against the formula, memory counted, nothing written."""

from dataclasses import replace

import pytest

from vivace.distill import Stage, Student
from vivace.distill import plan as plans
from vivace.distill.plan import make_plan, teacher_calls
from vivace.families import FAMILIES


def test_teacher_calls(config):
    stage = Stage(batches=1, steps=4)
    # modes at every index, each smeared by exp(-2) onto its neighbours: 4, 3, 2, 1 calls from index 0, 1, 2, 3
    assert teacher_calls(config(), stage) == pytest.approx(2.5)
    assert teacher_calls(config(timesteps="uniform"), stage) == pytest.approx(2.5)
    assert teacher_calls(config(method="consistency"), stage) == 1
    assert teacher_calls(config(), replace(stage, distillation=0.0, matching=1.0)) == 0


def test_a_plan_measures_every_stage_and_writes_nothing(config, tmp_path):
    chosen = config(tmp_path / "out", student=Student(rank=4, ema=0.9))
    plan = make_plan(chosen, pipe=FAMILIES["sd3"].tiny())
    assert [stage.batches for stage in plan.stages] == [2, 8]
    assert all(stage.seconds > 0 and 0 < stage.rollout < 1 for stage in plan.stages)
    assert plan.hours == pytest.approx(sum(s.batches * s.seconds for s in plan.stages) / 3600)
    transformer = FAMILIES["sd3"].tiny().transformer
    assert plan.memory["transformer"] == sum(4 * p.numel() for p in transformer.parameters())
    assert plan.memory["its gradients and AdamW's moments"] == 3 * plan.memory["student"]
    assert plan.memory["running mean"] == plan.memory["student"]
    assert plan.to_dict()["hours"] == plan.hours
    assert not (tmp_path / "out").exists()


def test_a_cpu_measures_small_batches(config, tmp_path, monkeypatch):
    seen = []
    measured = plans._measure
    monkeypatch.setattr(
        plans, "_measure", lambda training, *a, **kw: seen.append(training.config.batch) or measured(training, *a, **kw)
    )
    plan = plans.make_plan(config(tmp_path / "out", batch=64), pipe=FAMILIES["sd3"].tiny())
    assert seen == [plans.CPU_BATCH] * 2
    assert [stage.pictures_per_second * stage.seconds for stage in plan.stages] == pytest.approx([64, 64])
