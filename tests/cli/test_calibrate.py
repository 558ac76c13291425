"""`vivace calibrate` from end to end, on a random model of the built-in one's class."""

import json

import pytest

from vivace import cli
from vivace.families import FAMILIES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd3"
    FAMILIES["sd3"].tiny().save_pretrained(folder)
    (folder / "vivace.json").write_text('{"steps": 8, "guidance": 3.0, "size": [64, 64]}')
    return folder


def write(folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("a fox\na dog\na red house\nseven cats\n")
    return prompts


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in ("calibrate", *arguments)])
    return int(ended.value.code or 0)


def test_writes_a_file_that_generate_takes(model, tmp_path, capsys):
    out = tmp_path / "calibration.json"
    assert run(model, "--prompts", write(tmp_path), "--shares", "0.5", "-o", out) == 0
    document = json.loads(out.read_text())
    assert document["steps"] == 8
    assert str(out) in capsys.readouterr().out
    arguments = ["generate", "a fox", "--model", model, "-o", tmp_path / "out.png", "--json"]
    with pytest.raises(SystemExit):
        cli.main([str(a) for a in (*arguments, "--cache", f"planned:file={out}")])
    said = json.loads(capsys.readouterr().out)
    assert said["cache"]["transformer"]["last_request"]["computed"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompts is needed"),
        (("--shares", "2"), "no shares between 0 and 1"),
        (("-o", "none/calibration.json"), "cannot be written"),
        (("-o", "/proc/calibration.json"), "-o /proc/calibration.json cannot be written"),
        (("--guidance", "nan"), "--guidance must be from 0 to 1000, got nan"),
        (("--seed", "9223372036854775808"), "--seed must be from 0 to 9223372036854775807, got 9223372036854775808"),
        (("--steps", "0"), "--steps must be 1 or more, got 0"),
        (("--size", "0x64"), "--size '0x64' is not WxH"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, arguments, message):
    prompts = () if message.startswith("--prompts") else ("--prompts", write(tmp_path))
    assert run(model, *prompts, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_what_cannot_be_planned_is_said(model, tmp_path, capsys):
    """8 steps: one computed step is reached over all the others, none is not; and 8 leave nothing to skip."""
    out = tmp_path / "calibration.json"
    assert run(model, "--prompts", write(tmp_path), "--shares", "0.01,0.99", "-o", out) == 0
    reason = "no plans of [0, 8] computed steps of 8, only from 1 to 7"
    assert reason in json.loads(out.read_text())["refused"]["planned"]
    assert reason in capsys.readouterr().out, "in a pipe nothing is cut to a terminal's width"
