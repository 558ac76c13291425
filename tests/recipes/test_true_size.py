"""The recipe for true sizes on tiny models: whole batches of every stage, in turns, and what a budget cuts."""

import json
from itertools import product

import pytest

from vivace.distill.training import Training

STAGES = [
    "stages=[{batches: 3, steps: 8, modes: [0, 0, 0.5, 0.5]}, {batches: 3, steps: 8, matching: 0.5, adversarial: 0.3}]"
]


@pytest.fixture
def measured(distill_recipe, tmp_path):
    recipe = distill_recipe("true_size")

    def run(*arguments, model="sdxl"):
        path = tmp_path / "found.json"
        recipe.main([model, "--tiny", "-o", str(path), "--set", *STAGES, *arguments])
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_whole_batches_are_timed_in_turns(measured, monkeypatch, model):
    steps, calls = [], []
    step, target = Training.step, Training.target

    def counted(training, stage):
        step(training, stage)
        assert training.learners["student"].optimizer.state
        steps.append((training.config.accelerate, stage.adversarial > 0))

    def listened(training, item, start, stage):
        calls.append(len(start.grid) - 1)
        return target(training, item, start, stage)

    monkeypatch.setattr(Training, "step", counted)
    monkeypatch.setattr(Training, "target", listened)
    found = measured("--repeats", "2", "--presets", "exact", model=model)
    # Two that warm up each; then stock and exact, in the second round the other way round.
    warm = [(preset, late) for preset in (None, "exact") for late in (False, True)]
    assert steps == [
        *warm, (None, False), ("exact", False), (None, True), ("exact", True),
        ("exact", False), (None, False), ("exact", True), (None, True),
        # and one of each that is looked into
        (None, False), ("exact", False), (None, True), ("exact", True),
    ]  # fmt: skip
    for number in (0, 1):
        stock, exact = (found[name]["stages"][number] for name in ("stock", "exact"))
        assert stock["batches"] == exact["batches"] == 2
        assert {stock["teacher calls"]} == {exact["teacher calls"]} == {calls[number]}
        assert 0 < exact["rollout"] < 1
        assert exact["seconds"] > 0
        assert stock["times as fast"] == 1
        assert stock["rollout's end, distance from stock's"] == 0 < exact["rollout's end, distance from stock's"] < 1e-3
    assert found["left out"] == []
    for name, stage in product(("stock", "exact"), (0, 1)):
        parts = {part: took["seconds"] for part, took in found[name]["where the time goes"][stage].items()}
        whole, text, vae = (parts.pop(part) for part in ("whole batch", "of that text", "of that VAE"))
        data = parts["data, text and VAE"]
        assert 0 < text + vae < data
        assert 0 < parts.pop("of that backward") < parts["losses and backward"]
        assert set(parts) == {"data, text and VAE", "rollout", "losses and backward", "optimizer"}
        assert 0.5 * whole < sum(parts.values()) < whole


def test_a_budget_ends_it_and_is_said(measured, capsys, monkeypatch):
    found = measured("--repeats", "1000", "--budget-s", str(0))
    assert found["left out"] == ["rounds 1 to 1000 from stage 1 on"]
    assert found["stock"]["stages"] == []
    assert "left out for the budget: rounds 1 to 1000" in capsys.readouterr().out
