"""`vivace tune` on the command line: a frontier that is resumed, of the files that were measured."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vivace import cli
from vivace.families import FAMILIES


@pytest.fixture
def run(monkeypatch):
    def given(*arguments) -> int:
        words = ["tune", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", ["vivace", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        return int(ended.value.code or 0)

    return given


def drawn(folder) -> int:
    return sum(bool(line) for line in (folder / "records-0.jsonl").read_text().splitlines())


def test_writes_the_frontier_and_goes_on_with_what_is_the_same(run, tmp_path, capsys):
    model, prompts, out = tmp_path / "sd3", tmp_path / "prompts.txt", tmp_path / "tune"
    FAMILIES["sd3"].tiny().save_pretrained(model)
    prompts.write_text("a fox\na red house\n")
    options = ("--prompts", prompts, "--cache", "steps:compute=0-1", "--steps", 3, "--size", "64x64", "--device", "cpu")
    assert run(model, *options, "-o", out) == 0
    document = json.loads((out / "tune.json").read_text())
    assert document["command"].startswith(f"vivace tune {model} --prompts")
    assert (out / "frontier.png").stat().st_size > 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("Config(")
    assert document["refused"]
    assert all(name in said for name in document["refused"]), "what was left out is said"
    first = drawn(out)
    assert run(model, *options, "-o", out) == 0
    assert drawn(out) == first
    # The same path, other weights.
    (weights,) = (model / "transformer").glob("*.safetensors")
    save_file({name: tensor + torch.rand_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    assert run(model, *options, "-o", out) == 0
    assert drawn(out) > first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-quality", "psnr=nan"), "is not understood"),
        (("--target-speed", "0x"), "is not understood"),
        (("--target-speed", "-2x"), "is not understood"),
        (("--target-speed", "2x", "--target-quality", "psnr=30"), "give one"),
        (("--cache", "firstblok"), "nearest is 'firstblock'"),
        (("--cache", "planned:file=none.json"), "cannot read the calibration none.json"),
        (("--cache", "deepcache"), "needs a UNet's down and up blocks"),
        (("--frames", "9"), "--frames is for videos, which builtin is not known to make"),
        (("--size", "4096x4096"), "--size 4096x4096 cannot be made: the longest side of builtin is"),
        (("--steps", "0"), "--steps must be 1 or more, got 0"),
        (("--guidance", "nan"), "--guidance must be from 0 to 1000, got nan"),
        (("--seed", "9223372036854775808"), "--seed must be from 0 to 9223372036854775807, got 9223372036854775808"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    assert run("builtin", "-o", tmp_path, "--device", "cpu", *arguments) == 2
    assert not list(tmp_path.glob("records-*"))
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
