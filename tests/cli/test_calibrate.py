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


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in ("calibrate", *arguments)])
    return int(ended.value.code or 0)


def test_writes_a_file_that_generate_takes(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na dog\na red house\nseven cats\n")
    out = tmp_path / "calibration.json"
    assert run(model, "--prompts", prompts, "--shares", "0.5", "-o", out) == 0
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
    ],
)
def test_bad_input_is_one_line(model, capsys, arguments, message):
    assert run(model, *arguments) == 2
    assert message in capsys.readouterr().err
