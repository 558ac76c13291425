"""Calibration: what it writes runs, beats the controls on held-out prompts, and is refused where it does not."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import HeunDiscreteScheduler

import vivace
from vivace import InputError
from vivace.cache import fit
from vivace.cache.calibrate import calibrate, gains
from vivace.cache.schedule import Errors, schedules, uniform

PROMPTS = ["a fox", "a dog", "a red house", "blue sky at night", "seven cats"]
STEPS = 12


@pytest.fixture(scope="module")
def document():
    from vivace.families import FAMILIES

    pipe = FAMILIES["sd3"].tiny()
    return calibrate(pipe, PROMPTS, steps=STEPS, shares=(0.34, 0.6), height=64, width=64, guidance_scale=4.0)


def test_plans_beat_an_even_mask_and_fewer_steps(document):
    assert document["planned"]
    for row in document["planned"]:
        assert 0 in row["compute"]
        count = len(row["compute"])
        assert {f"{count} steps", f"{count} steps of unipc"} < row["controls"].keys()
        assert row["error"] < min(row["controls"].values())
        assert set(row["compute"]) | set(map(int, row["weights"])) == set(range(STEPS))


def test_what_is_written_can_be_used(document, pipe, draw, last, tmp_path):
    document = dict(document)
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(document))
    exact = draw(pipe)
    vivace.accelerate(pipe, cache=f"planned:file={file},computed=0.6")
    fast = draw(pipe)
    assert last(pipe)["computed"] == round(0.6 * STEPS)
    assert (fast - exact).norm() / exact.norm() < 0.05
    assert document["firstblock"]
    for row in document["firstblock"]:
        vivace.accelerate(pipe, cache=f"firstblock:threshold={row['threshold']}")
        asked = draw(pipe)
        assert abs(last(pipe)["computed"] / STEPS - row["computed_percent"] / 100) < 0.25
        vivace.accelerate(pipe, cache=f"firstblock:file={file},computed={row['computed_percent'] / 100}")
        assert torch.equal(draw(pipe), asked)
    del document["firstblock"]
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="has no threshold for firstblock"):
        vivace.accelerate(pipe, cache=f"firstblock:file={file}")
    with pytest.raises(InputError, match="computed= takes a calibration's threshold"):
        vivace.accelerate(pipe, cache="firstblock:computed=0.3")


def test_the_evidence_is_in_the_document(document):
    assert document["prompts"] == {"fitted": 3, "held_out": 2}
    assert document["call"]["guidance_scale"] == 4.0
    assert {"vivace", "machine", "denoiser", "seed", "refused"} <= document.keys()
    assert "teacache" in document or "teacache" in document["refused"]


def test_a_few_prompts_are_too_few(pipe):
    with pytest.raises(InputError, match="at least 4 different prompts"):
        calibrate(pipe, ["a", "b", "b", "a", "a"], steps=4)
    with pytest.raises(InputError, match="got 1; give 2 steps or more"):
        calibrate(pipe, PROMPTS, steps=1)


def test_shares_of_few_steps_are_not_repeated(pipe):
    found = calibrate(pipe, PROMPTS[:4], steps=4, shares=(0.25, 0.3, 0.5, 0.55), height=64, width=64)
    counts = [len(row["compute"]) for row in found["planned"]]
    assert counts == sorted(set(counts))
    computed = [row["computed_percent"] for row in found["firstblock"]]
    assert len(computed) == len(set(computed))


def test_fewer_steps_of_heun_have_as_many_evaluations_as_the_plan(unet_pipe, monkeypatch):
    monkeypatch.setattr(unet_pipe, "scheduler", HeunDiscreteScheduler.from_config(unet_pipe.scheduler.config))
    found = calibrate(unet_pipe, PROMPTS[:4], steps=6, shares=(0.6,))
    (plan,) = found["planned"]
    assert (plan["steps"], len(plan["compute"])) == (11, 7)
    assert "4 steps" in plan["controls"]


def test_a_pipeline_without_prompts():
    from vivace.families import FAMILIES

    pipe = FAMILIES["svd"].tiny()
    with pytest.raises(InputError, match="StableVideoDiffusionPipeline takes no prompt"):
        calibrate(pipe, PROMPTS, steps=4)


def test_a_polynomial_is_found_again():
    true = [3.0, -2.0, 1.5, 0.5, 0.1]

    def pairs(xs):
        return [(x, sum(c * x**p for c, p in zip(true, range(4, -1, -1), strict=True))) for x in xs]

    found, reason = fit.teacache(pairs([i / 100 for i in range(1, 60)]), pairs([i / 90 for i in range(1, 50)]))
    assert not reason
    assert found["r2"] > 0.999999
    assert found["coefficients"] == pytest.approx(true, abs=1e-5)


def test_noise_is_refused():
    draw = torch.Generator().manual_seed(0)

    def pairs(n):
        return [tuple(row) for row in torch.rand(n, 2, generator=draw, dtype=torch.float64).tolist()]

    found, reason = fit.teacache(pairs(8), pairs(200))
    assert found is None
    assert "no better than a constant" in reason


def test_a_threshold_computes_its_share():
    run = [tuple(0.1 * k for k in range(1, min(step, 8) + 1)) for step in range(40)]
    for share in (0.25, 0.5):
        assert fit.computed([run], fit.threshold([run], share)) == pytest.approx(share, abs=0.03)


def errors_of(outputs: torch.Tensor, gain=None, effect=None) -> Errors:
    steps = outputs.shape[0]
    times = tuple(1000.0 * (1 - i / steps) for i in range(steps))
    products = outputs.double() @ outputs.double().T
    return Errors(times=times, products=products, gain=gain or [1.0] * steps, effect=effect or [1.0] * steps)


def test_outputs_that_lie_on_a_line_need_two_steps():
    place = torch.arange(8, dtype=torch.float64)[:, None]
    torch.manual_seed(0)
    line = torch.ones(1, 5, dtype=torch.float64) + place * torch.randn(1, 5, dtype=torch.float64)
    choice = schedules(errors_of(line))[2]
    assert choice.error < 1e-2 * line.norm()
    # Only the steps right after the first have nothing but it to go by.
    assert choice.compute == (0, 1)
    assert choice.weights[3] == pytest.approx((-2.0, 3.0), abs=1e-2)


def test_an_estimate_makes_up_for_those_before_it():
    torch.manual_seed(0)
    # Smooth along the run, as outputs are.
    outputs = torch.vander(torch.linspace(0, 1, 10, dtype=torch.float64), 5) @ torch.randn(5, 40, dtype=torch.float64)
    effect = [0.1 * (1 + i) for i in range(10)]
    errors = errors_of(outputs, effect=effect)
    compute = (0, 1, 3, 5, 7, 8)

    def final(weights) -> float:
        total = torch.zeros(40, dtype=torch.float64)
        for step, factors in weights.items():
            nodes = [one for one in compute if one < step][-len(factors) :]
            estimate = sum(w * outputs[node] for w, node in zip(factors, nodes, strict=True))
            total += effect[step] * (estimate - outputs[step])
        return total.norm().item()

    fitted = errors.weights(compute)
    assert set(fitted) == set(range(10)) - set(compute)
    # The last step's are the best for the final latent, and not those that are nearest to its own output.
    alone = errors.fit((5, 7, 8), torch.eye(10, dtype=torch.float64)[9])[[5, 7, 8]]
    assert final(fitted) < 0.95 * final({**fitted, 9: tuple(alone.tolist())})
    for place in range(3):
        other = list(fitted[9])
        other[place] += 0.01
        assert final(fitted) < final({**fitted, 9: tuple(other)})


def test_the_best_of_all_schedules_is_found():
    """Beside trying every one of them."""
    from itertools import combinations

    torch.manual_seed(0)
    outputs = torch.randn(9, 6).cumsum(0)
    errors = errors_of(outputs, gain=[1.0 + 0.3 * i for i in range(9)])
    for count in (3, 4, 6):
        trials = {}
        for rest in combinations(range(1, 9), count - 1):
            path = (0, *rest)
            nodes = [path[max(0, i - 2) : i + 1] for i in range(count)]
            ends = [*path[1:], 9]
            trials[path] = math.sqrt(sum(errors.gap(n, end) ** 2 for n, end in zip(nodes, ends, strict=True)))
        best = schedules(errors)[count]
        assert best.error == pytest.approx(min(trials.values()))
        assert trials[best.compute] == pytest.approx(best.error)


def test_a_tiny_last_step_says_nothing_of_those_before_it():
    # What later steps make of an error is 2 everywhere; the last step is a hundredth of the others.
    found = gains({1: 0.2, 5: 0.002}, [-0.1, -0.1, -0.1, -0.2, -0.2, -0.001])
    assert found == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.4, 0.002])
    # Heun's first evaluations have no effect of their own.
    assert gains({0: 0.5, 2: 0.5}, [0.0, 0.1, 0.0, 0.1])[::2] == pytest.approx([0.5, 0.5])
    assert gains({0: 0.5, 1: 0.3, 2: 0.5}, [0.0, 0.1, 0.0, 0.1])[3] == pytest.approx(0.3)


def test_what_later_steps_make_of_an_error_counts_to_a_power():
    outputs = torch.randn(3, 4)
    for power, counted in ((0.0, 2.0), (0.5, 6.0), (1.0, 18.0)):
        errors = replace(errors_of(outputs, gain=[18.0] * 3, effect=[-2.0] * 3), amplified=power)
        assert errors.counted(1) == pytest.approx(counted)
    assert errors_of(outputs, gain=[18.0] * 3, effect=[0.0] * 3).counted(1) == 18


def test_the_less_it_counts_the_later_are_the_computed_steps():
    torch.manual_seed(0)
    errors = errors_of(torch.randn(16, 8).cumsum(0), gain=[3.0 ** (-step / 3) * 40 for step in range(16)])
    centres = [sum(schedules(replace(errors, amplified=power))[6].compute) for power in (1.0, 0.5, 0.0)]
    assert centres == sorted(set(centres))


def test_more_computed_steps_are_never_worse():
    torch.manual_seed(1)
    found = schedules(errors_of(torch.randn(12, 4).cumsum(0)))
    assert [found[n].error for n in sorted(found)] == sorted((c.error for c in found.values()), reverse=True)
    assert found[12].error == 0


def test_an_even_mask_has_both_ends():
    assert uniform(10, 4) == (0, 3, 6, 9)
    assert uniform(28, 14)[0] == 0
    assert len(uniform(28, 14)) == 14
