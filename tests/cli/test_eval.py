"""`vivace eval` on the command line: the built-in model's examination and a comparison, with real pictures."""

import json
import shlex

import pytest

from vivace import cli
from vivace.families import FAMILIES


@pytest.fixture
def run(monkeypatch):
    def given(*arguments) -> int:
        words = ["eval", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", ["vivace", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        return int(ended.value.code or 0)

    return given


def test_examines_the_built_in_model_and_says_how(run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ("--captions", 3, "--steps", 2, "--guidance", 2.5, "--seed", 7, "--device", "cpu")
    assert run("builtin", *options, "--json", file) == 0
    document = json.loads(file.read_text())
    told = "vivace eval builtin --captions 3 --steps 2 --guidance 2.5 --seed 7 --device cpu"
    assert document["command"] == told
    facts = {name: document[name] for name in ("captions", "steps", "guidance", "seed", "device")}
    assert facts == {"captions": 3, "steps": 2, "guidance": 2.5, "seed": 7, "device": "cpu"}
    rows = {(row["name"], row["of"]): row for row in document["metrics"]}
    assert rows["caption accuracy", "all"]["count"] == 3
    assert rows["reader right", "renders of the exam's scenes"]["value"] == 100.0
    assert "caption accuracy" in capsys.readouterr().out


def test_compares_presets_and_says_how(run, tmp_path, capsys):
    model, prompts = tmp_path / "sd3", tmp_path / "prompts.txt"
    FAMILIES["sd3"].tiny().save_pretrained(model)
    prompts.write_text("a fox\na red house\n")
    options = ("--cache", "firstblock:threshold=0.2", "--prompts", prompts, "--steps", 2, "--size", "64x64")
    assert run(model, *options, "--device", "cpu", "-o", tmp_path / "eval") == 0
    said = capsys.readouterr().out
    assert "firstblock:threshold=0.2" in said, "names are whole in a pipe"
    metrics = said.splitlines()[-1]
    assert metrics == str(tmp_path / "eval" / "metrics.json")
    command = json.loads((tmp_path / "eval" / "metrics.json").read_text())["command"]
    given = shlex.split(command)
    assert given[:3] == ["vivace", "eval", str(model)]
    assert given[3:] == [*map(str, options), "--device", "cpu"]


def test_compares_videos_of_so_many_frames(run, tmp_path):
    model, prompts, out = tmp_path / "wan", tmp_path / "prompts.txt", tmp_path / "eval"
    FAMILIES["wan"].tiny().save_pretrained(model)
    prompts.write_text("a fox\na red house\n")
    options = ("--cache", "steps:compute=0", "--prompts", prompts, "--steps", 3, "--size", "32x32", "--device", "cpu")
    assert run(model, *options, "--frames", 4, "-o", out) == 2
    assert run(model, *options, "--frames", 5, "-o", out) == 0
    document = json.loads((out / "metrics.json").read_text())
    assert document["call"]["num_frames"] == 5
    (cached,) = (verdict for verdict in document["verdicts"] if verdict["role"] == "candidate")
    assert "temporal error" in [metric["name"] for metric in cached["metrics"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "--steps must be 1 or more, got 0"),
        (("--captions", 2), "at least 3 captions"),
        (("--captions", 0), "Invalid value for '--captions'"),
        (("--guidance", "nan"), "--guidance must be from 0 to 1000, got nan"),
        (("--seed", 2**63), "--seed must be from 0 to 9223372036854775807, got 9223372036854775808"),
        (("folder",), "eval examines builtin, got 'folder'"),
        (("--workers", 2), "need --ray"),
        (("--json", "none/figures.json"), "cannot be written"),
        (("--prompts", "prompts.txt"), "--prompts needs --presets or --cache"),
        (("--frames", 5), "--frames needs --presets or --cache"),
        (("-o", "figures.json"), "-o needs --presets or --cache"),
        (("--presets", "exact,fast", "--json", "figures.json"), "--json is for the examination alone"),
        (("--json", "/proc/figures.json"), "--json /proc/figures.json cannot be written"),
        (("--presets", "exact"), "nothing to compare with 'exact'"),
        (("--presets", "exact,fast", "--inception", "weights.pth"), "--inception is for FID and KID"),
        (("--presets", "exact,fast", "--captions", 3, "--prompts", "prompts.txt"), "give one"),
        (("--presets", "exact,fast", "--fid", "a", "--kid", "b"), "take one folder"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
