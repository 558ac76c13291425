"""The grid's list keeps what a person said of its pictures as long as the weights are the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from vivace import builtin

RECIPE = Path(__file__).parents[2] / "recipes" / "builtin"


@pytest.fixture(scope="module")
def grid(recipe) -> ModuleType:
    return recipe("grid")


def test_the_grid_keeps_verdicts_by_eye_only_for_the_same_weights(grid: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    row = {"seed": 64, "caption": "a red star", "reader": True}
    grid.write([row], weights="one", path=path)
    path.write_text(path.read_text().replace('"reader": true', '"reader": true, "eye": false'))
    for weights, eyes in (("one", [False]), ("other", []), ("one", [])):
        grid.write([row], weights=weights, path=path)
        assert [kept["eye"] for kept in json.loads(path.read_text())["pictures"] if "eye" in kept] == eyes


def test_weights_are_told_apart_but_not_by_zeros_beside_them(grid: ModuleType, tmp_path: Path) -> None:
    told = []
    x = torch.arange(1.0, 13).view(2, 3, 2)
    wide = torch.zeros(4, 3, 5)
    wide[:2, :, :2] = x
    for tensor in (x, wide, x + 1):
        (tmp_path / "vae").mkdir(exist_ok=True)
        save_file({"weight": tensor}, tmp_path / "vae" / "model.safetensors")
        told.append(grid.identity(tmp_path))
    assert told[0] == told[1] != told[2]


def test_the_committed_grid_is_of_the_weights_that_ship(grid: ModuleType) -> None:
    listed = json.loads((RECIPE.parents[1] / "docs" / "grid.json").read_text())
    assert listed["weights"] == grid.identity(Path(builtin.__file__).parent / "model")
    assert len(listed["pictures"]) == 64
    assert sum(row["eye"] == row["reader"] for row in listed["pictures"]) >= 62
