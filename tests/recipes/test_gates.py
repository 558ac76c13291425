"""A stage goes on when it has reached its bars, and only then."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gates(recipe) -> ModuleType:
    return recipe("gates")


def test_a_gate_takes_what_reaches_its_bars_and_names_what_does_not(gates: ModuleType) -> None:
    reached = {"right": 0.94, "heldout less right": -0.01, "renders": 0.9996, "right at few steps": 0.9}
    assert gates.missed("evaluate", reached) == []
    assert gates.missed("evaluate", reached | {"right": 0.89, "heldout less right": -0.06}) == [
        "right is 0.89, it has to be at least 0.9",
        "heldout less right is -0.06, it has to be at least -0.05",
    ]
    sizes = {"right": 1.0, "right at few steps": 1.0, "megabytes": 27.0, "megabytes of the largest file": 11.0}
    assert gates.missed("publish", sizes) == ["megabytes is 27, it has to be at most 26"]
    assert gates.missed("curves", {}) == []


def test_every_stage_but_the_pictures_has_a_gate_with_its_bars(gates: ModuleType) -> None:
    asked = {("reader2", "renders"): 0.995, ("reader2", "reconstructions"): 0.99, ("evaluate", "right"): 0.9}
    asked[("evaluate", "right at few steps")] = 0.8
    bars = {(stage, bar.figure): bar.least for stage, found in gates.GATES.items() for bar in found}
    assert asked.items() <= bars.items()
    assert len(gates.GATES) == 7
