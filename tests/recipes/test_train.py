"""The recipe of the built-in model, all of it once, tiny."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from vivace.builtin.reader import WEIGHTS, load_reader

RECIPE = Path(__file__).parents[2] / "recipes" / "builtin"


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
    bars = {"reader": "renders", "autoencoder": "psnr", "reader2": "reconstructions", "transformer:0.46-1": "right"}
    assert all(figure in stages[name] for name, figure in bars.items())
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("reader=x",), "reader=x: a stage of training takes a number of steps from 1 on"),
        (("reader=0",), "reader=0: a stage of training takes a number of steps from 1 on"),
        (("publish=3",), "publish=3: a stage of training takes a number of steps from 1 on, the others none"),
        (("reader", "--resume", "none"), "no folder none to resume from"),
    ],
)
def test_a_mistake_ends_the_run_before_anything_is_made(recipe, tmp_path, monkeypatch, capsys, arguments, said) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--state", "state", "--out", "out"])
    with pytest.raises(SystemExit, match="2"):
        recipe("train").main()
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["publish", "evaluate", "curves", "grid"])
def test_an_ending_without_what_it_needs_says_so(recipe, tmp_path, stage) -> None:
    pytest.importorskip("matplotlib")
    run = recipe("extent").Run(state=tmp_path, out=tmp_path, device="cpu")
    with pytest.raises(SystemExit, match=f"{stage} needs .* in {tmp_path}: run the stages before it"):
        recipe("train").pass_through(stage, run)
