"""The cases of the budget benchmark name models that are there, and each has a plan."""

from dataclasses import replace

import pytest
import torch

from vivace import Config, InputError
from vivace.accelerate import accelerate, acceleration_of
from vivace.bench.budgets import CASES, STEPS, WAYS, apart, bounds, facts, offload, run
from vivace.bench.process import Children
from vivace.families import FAMILIES
from vivace.memory.placement import CONTEXT, GIB, Part, Placed, Placement
from vivace.passes.target import Target
from vivace.passes.vram import TOO_SMALL, planned


@pytest.mark.parametrize("name", ["flux-12", "sdxl-6", "sd3.5-medium-8"])
def test_a_plan_for_every_budget(name):
    """At true size, from shapes alone."""
    pytest.importorskip("triton")
    case = CASES[name]
    family = FAMILIES[case.family]
    variant = family.variant(case.variant)
    encoders = {**family.text_encoders, **variant.text_encoders}
    slots = {slot: slot for slot in ("vae", *encoders)} | {family.denoisers[0]: "denoiser"}
    full = {
        slot: family.full(case.variant, component=what, device="meta", dtype=torch.bfloat16)
        for slot, what in slots.items()
    }
    denoisers = {family.denoisers[0]: full.pop(family.denoisers[0])}
    subject = type("Pipeline", (), {"components": full})()
    target = Target(subject=subject, family=family, config=Config(), denoisers=denoisers, place=torch.device("cuda"))
    budget = case.budget * GIB - CONTEXT
    plan = planned(target, budget=budget)
    assert plan.peak <= budget
    assert plan.level == "streamed"
    assert plan.unfused is None
    # Copies that take longer than launches leave a recording nothing to save.
    assert (plan.recorded > 0) == (name != "flux-12")
    if name == "flux-12":
        assert 10 * GIB < plan.moved_per_call < 22 * GIB
        assert planned(target, budget=64 * GIB).recorded > 0
        # All modulation stays on the device, for which a smaller budget has no room.
        least = planned(target, budget=5 * GIB)
        assert least.unfused == TOO_SMALL
        with pytest.raises(InputError, match="the smallest plan"):
            planned(replace(target, config=Config(fuse="on")), budget=5 * GIB)
    if name == "sdxl-6":
        least = planned(target, budget=3 * GIB // 2)
        assert least.unrecorded is not None
        with pytest.raises(InputError, match="the smallest plan"):
            planned(replace(target, config=Config(graphs="on")), budget=3 * GIB // 2)


@pytest.mark.parametrize(("name", "calls"), [("sd3", 1), ("wan", 2)])
def test_a_step_moves_what_all_its_calls_move(name, calls):
    pipe = FAMILIES[name].tiny()
    accelerate(pipe)
    video = {"num_frames": 5} if name == "wan" else {}
    pipe("a frog", width=64, height=64, num_inference_steps=STEPS, output_type="latent", **video)
    part = Part(name="transformer", kind="denoiser", held=0, blocks=(GIB,))
    acceleration = acceleration_of(pipe)
    acceleration.target.placement = Placement(level="streamed", budget=None, placed=(Placed(part=part, streamed=(0,)),))
    found = facts(pipe)
    assert found["moved_per_step"] == calls * GIB
    held = bounds({**found, "step_s": 3.0, "bandwidth": GIB}, {"step_s": 0.5, "stock_step_s": 1.5})
    assert held == {"of_bound": 3 / calls, "of_stock_bound": 3 / max(1.5, calls)}
    assert bounds({**found, "step_s": 3.0, "bandwidth": GIB}, {"step_s": 0.5}) == {"of_bound": 3 / calls}


@pytest.mark.gpu
@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_peer_draws_the_same_picture(name, by_blocks):
    pipe = FAMILIES[name].tiny()

    def picture():
        options = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "latent"}
        return pipe("a frog", generator=torch.Generator().manual_seed(0), **options).images.cpu()

    wanted = picture()
    given = offload(pipe, by_blocks=by_blocks)
    assert given["vae.enable_tiling"]
    # The one is computed on the CPU, the other with the tensor cores' short fp32.
    assert (picture() - wanted).norm() < 0.02 * wanted.norm()


def test_every_case_is_a_model():
    for case in CASES.values():
        assert FAMILIES[case.family].variant(case.variant).denoiser is not None


def test_ways_are_kept_as_they_come_and_only_what_failed_is_tried_again():
    asked, kept = [], []

    def measured(name, way, *, seconds):
        asked.append(way)
        return {"failed": "no room"} if way == "resident" else {"step_s": 1.0, "moved_per_step": 0, "bandwidth": 1}

    resident = {"step_s": 2.0, "stock_step_s": 4.0}

    names = ["sdxl-6"]
    result = run(names, measure=measured, on_row=lambda found: kept.append(len(found["rows"]["sdxl-6"]) - 1))
    assert (asked, kept) == ([*WAYS], [*range(1, len(WAYS) + 1)])
    again = run(names, rows=result["rows"], measure=lambda *_, seconds: resident)
    assert again["rows"]["sdxl-6"]["resident"] == resident
    ours = again["rows"]["sdxl-6"]["vivace"]
    assert (ours["of_bound"], ours["of_stock_bound"]) == (0.5, 0.25)
    assert "of_bound" not in again["rows"]["sdxl-6"]["group offload"]
    assert list(run(["flux-12"], budget=1.0, measure=measured)["rows"]["flux-12"]) == ["case"]


def test_a_way_that_ends_says_why():
    assert "Error" in apart(Children("vivace.bench.budgets"), "sdxl-6", "no such way", seconds=60)["failed"]
