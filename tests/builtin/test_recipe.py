"""The recipe of the built-in model: all of it once, tiny, and what its parts promise."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from vivace.builtin.reader import WEIGHTS, load_reader

RECIPE = Path(__file__).parents[2] / "recipes" / "builtin"


def part(name: str) -> ModuleType:
    """One file of the recipe that needs no other one."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "MPLBACKEND": "agg"})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("recipe")
    done = train("--state", folder / "state", "--out", folder / "out", "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "reader missed its gate: renders is 0, it has to be at least 0.995" in done.stderr
    return folder / "out"


def test_one_command_runs_through_to_the_figures_and_pictures(out: Path) -> None:
    stages = json.loads((out / "stages.json").read_text())
    assert list(stages) == [
        "reader", "autoencoder", "reader2", "transformer:0-0.46", "transformer:0.46-1",
        "publish", "evaluate", "curves", "grid",
    ]  # fmt: skip
    gates = part("gates").GATES
    assert all(set(stages[name]) >= {bar.figure for bar in bars} for name, bars in gates.items())
    assert stages["publish"]["megabytes"] < 26
    steps = [row["step"] for row in json.loads((out / "curves.json").read_text())["curve"]]
    assert steps[-1] == 4
    for name in ("eval.json", "eval-few-steps.json", "grid.json", "grid.png", "training.png"):
        assert (out / name).stat().st_size > 0, name
    assert len(json.loads((out / "grid.json").read_text())["pictures"]) == 4


def test_what_is_published_is_the_run_s_own(out: Path) -> None:
    published, trained = (AutoencoderTiny.from_pretrained(out / name) for name in ("model/vae", "vae"))
    for name, tensor in trained.state_dict().items():
        # The published one may have wider latents.
        here = published.state_dict()[name][tuple(slice(length) for length in tensor.shape)]
        assert torch.equal(here, tensor), name
    for fact in ("scaling_factor", "shift_factor"):
        assert published.config[fact] == trained.config[fact]
    own, shipped = (load_reader(file).state_dict() for file in (out / "reader.safetensors", WEIGHTS))
    assert not torch.equal(own["stem.0.weight"], shipped["stem.0.weight"])


def test_a_stage_without_what_it_needs_says_so(tmp_path: Path) -> None:
    done = train("transformer:0.46-1", "--state", tmp_path / "state", "--out", tmp_path / "out", "--tiny")
    assert done.returncode == 1
    assert "transformer needs reader.pt, vae, student.pt" in done.stderr


def test_a_gate_takes_what_reaches_its_bars_and_names_what_does_not() -> None:
    gates = part("gates")
    reached = {"right": 0.94, "heldout less right": -0.01, "renders": 0.9996, "right at few steps": 0.9}
    assert gates.missed("evaluate", reached) == []
    assert gates.missed("evaluate", reached | {"right": 0.89, "heldout less right": -0.06}) == [
        "right is 0.89, it has to be at least 0.9",
        "heldout less right is -0.06, it has to be at least -0.05",
    ]
    sizes = {"right": 1.0, "right at few steps": 1.0, "megabytes": 27.0, "megabytes of the largest file": 11.0}
    assert gates.missed("publish", sizes) == ["megabytes is 27, it has to be at most 26"]
    assert gates.missed("curves", {}) == []


def test_the_grid_keeps_verdicts_by_eye_only_for_the_same_weights(tmp_path: Path) -> None:
    grid, path = part("grid"), tmp_path / "grid.json"
    row = {"seed": 64, "caption": "a red star", "reader": True}
    grid.write([row], weights="one", path=path)
    path.write_text(path.read_text().replace('"reader": true', '"reader": true, "eye": false'))
    for weights, eyes in (("one", [False]), ("other", []), ("one", [])):
        grid.write([row], weights=weights, path=path)
        assert [kept["eye"] for kept in json.loads(path.read_text())["pictures"] if "eye" in kept] == eyes


def test_weights_are_told_apart_but_not_by_zeros_beside_them(tmp_path: Path) -> None:
    grid, told = part("grid"), []
    x = torch.arange(1.0, 13).view(2, 3, 2)
    wide = torch.zeros(4, 3, 5)
    wide[:2, :, :2] = x
    for tensor in (x, wide, x + 1):
        (tmp_path / "vae").mkdir(exist_ok=True)
        save_file({"weight": tensor}, tmp_path / "vae" / "model.safetensors")
        told.append(grid.identity(tmp_path))
    assert told[0] == told[1] != told[2]
