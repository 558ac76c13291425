"""The tuner: the frontier of what was measured, the answer to a target, and what cannot be left out with a reason."""

import pytest
import torch

from vivace import Config, InputError
from vivace.accelerate import acceleration_of
from vivace.cache import FirstBlock
from vivace.evals.contest import Contest, Contestant
from vivace.evals.store import Store
from vivace.evals.verdict import Verdict
from vivace.families import FAMILIES
from vivace.tune import Target, as_code, choose, frontier, read_target, tune


def verdict(name: str, speedup: float, psnr: float | None) -> Verdict:
    role = "reference" if psnr is None else "candidate"
    distances = {} if psnr is None else {"PSNR": torch.tensor([float(psnr)])}
    return Verdict(
        contestant=Contestant(name=name, role=role, config=Config(), steps=8), seconds=1 / speedup, speedup=speedup,
        computed=None, peak_bytes=None, distances=distances,
    )  # fmt: skip


MEASURED = [
    verdict("exact", 1.0, None), verdict("slow and far", 0.9, 20), verdict("a", 1.5, 45), verdict("b", 2.0, 38),
    verdict("worse than b", 1.8, 35), verdict("c", 3.0, 25),
]  # fmt: skip


def test_the_frontier_has_only_what_nothing_beats():
    assert [v.contestant.name for v in frontier(MEASURED)] == ["c", "b", "a", "exact"]


@pytest.mark.parametrize(
    ("kind", "value", "name"),
    [("psnr", 30, "b"), ("psnr", 40, "a"), ("psnr", 60, "exact"), ("speed", 1.2, "a"), ("speed", 2.0, "b")],
)
def test_the_answer_to_a_target(kind, value, name):
    chosen = choose(frontier(MEASURED), Target(kind=kind, value=value))
    assert chosen.contestant.name == name


def test_a_target_out_of_reach():
    assert choose(frontier(MEASURED), Target(kind="speed", value=9)) is None


def test_targets_are_read():
    assert read_target(quality="psnr=28", speed=None) == Target(kind="psnr", value=28)
    assert read_target(quality=None, speed="2.5x") == Target(kind="speed", value=2.5)
    for wrong in ({"quality": "good", "speed": None}, {"quality": "psnr=3", "speed": "2x"}):
        with pytest.raises(InputError):
            read_target(**wrong)


def test_a_config_as_code_is_that_config():
    config = Config(attention="native", graphs="off", cache=FirstBlock(threshold=0.2))
    assert as_code(config) == "Config(attention='native', graphs='off', cache='firstblock:threshold=0.2')"
    assert eval(as_code(config), {"Config": Config}) == config


def test_tuning_a_tiny_model(tmp_path, monkeypatch):
    pipe = FAMILIES["sd3"].tiny()
    # The list of what is tried on any model, at the length of a test.
    monkeypatch.setattr("vivace.tune.CACHES", ("steps:compute=0-1,4", "deepcache", "planned"))
    contest = Contest(
        pipe=pipe, model="tiny", prediction="flow", prompts=("a fox", "a dog"), store=Store(tmp_path), steps=6,
        call={"height": 64, "width": 64},
    )  # fmt: skip
    tuned = tune(contest, Target(kind="psnr", value=1000))
    assert {"deepcache", "planned", "attention=cudnn"} <= tuned.refused.keys()
    assert "needs a UNet" in tuned.refused["deepcache"]
    names = [v.contestant.name for v in tuned.verdicts]
    assert {"steps:compute=0-1,4", "balanced", "fast"} <= {*names}
    assert tuned.chosen.contestant.name == "exact"


def test_what_fails_is_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("vivace.tune.CACHES", ("steps:compute=0-1",))
    pipe = FAMILIES["sd3"].tiny()

    def break_presets(module, args, kwargs):
        if acceleration_of(pipe) and acceleration_of(pipe).target.config.quant == "auto":
            raise RuntimeError("no C compiler was found\nand a long story")

    pipe.transformer.register_forward_pre_hook(break_presets, with_kwargs=True)
    contest = Contest(
        pipe=pipe, model="tiny", prediction="flow", prompts=("a fox",), store=Store(tmp_path), steps=3,
        call={"height": 64, "width": 64},
    )  # fmt: skip
    tuned = tune(contest, Target(kind="psnr", value=20))
    assert tuned.refused["balanced"] == tuned.refused["fast"] == "RuntimeError: no C compiler was found"
    assert "steps:compute=0-1" in [v.contestant.name for v in tuned.verdicts]
    assert acceleration_of(pipe) is None
