"""The cases of the budget benchmark name models that are there, and each has a plan."""

import pytest
import torch

from vivace import Config
from vivace.bench.budgets import CASES
from vivace.families import FAMILIES
from vivace.memory.placement import CONTEXT, GIB, place
from vivace.passes.target import Target
from vivace.passes.vram import parts_of


@pytest.mark.parametrize("name", ["flux-12", "sdxl-6", "sd3.5-medium-8"])
def test_a_plan_for_every_budget(name):
    """At true size, from shapes alone."""
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
    plan = place(parts_of(target), budget=budget)
    assert plan.peak <= budget
    assert plan.level != "resident"
    if name == "flux-12":
        assert plan.level == "streamed"
        assert 10 * GIB < plan.moved_per_step < 22 * GIB


def test_every_case_is_a_model():
    for case in CASES.values():
        assert FAMILIES[case.family].variant(case.variant).denoiser is not None
