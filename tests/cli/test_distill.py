"""`vivace distill` as a user runs it, and `generate --few-step` on what it made."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vivace import cli
from vivace.families import FAMILIES

CONFIG = """
teacher: {teacher}
output: {output}
size: [64, 64]
data: {{kind: builtin}}
batch: 2
student: {{rank: 4}}
accelerate: null
stages:
  - {{batches: 2, steps: 4, guidance: [2, 3]}}
records: {{trackers: [], sample_every: 0}}
"""


def code_of(*arguments: object) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny Stable Diffusion 3 in a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    FAMILIES["sd3"].tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def config(teacher, tmp_path):
    """A config file for it."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(teacher=teacher, output=tmp_path / "out"))
    return path


def test_train_then_generate_in_few_steps(config, teacher, tmp_path, capsys):
    assert code_of("distill", config, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["done"], result["stopped"]) == (2, False)
    model = tmp_path / "model"
    shutil.copytree(teacher, model)
    picture = tmp_path / "a.png"
    call = ("generate", "a red ring", "--model", model, "-o", picture, "--size", "64x64", "--seed", "1", "--json")
    assert code_of(*call, "--few-step") == 2
    assert "has no few-step student (a folder few_step in the model's)" in capsys.readouterr().err
    shutil.copytree(result["folder"], model / "few_step")
    assert code_of(*call, "--few-step") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["steps"] == 4
    assert made["applied"]["few_step"] is True
    assert made["applied"]["guidance_scale"] == 1.0
    assert made["applied"]["scheduler"] == "FewStepFlow"
    first = picture.read_bytes()
    assert code_of(*call, "--few-step", "--overwrite") == 0
    assert picture.read_bytes() == first
    assert code_of(*call, "--few-step", "--overwrite", "--steps", "2") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    assert code_of(*call, "--few-step", "--overwrite", "--scheduler", "euler") == 2


def test_dry_run(config, tmp_path, capsys):
    assert code_of("distill", config, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "hours on cpu" in said
    assert "transformer" in said
    assert not (tmp_path / "out").exists()
    assert code_of("distill", config, "--dry-run", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["stages"]) == 1


def test_precache_then_train(config, tmp_path, capsys):
    assert code_of("distill", config, "--precache", tmp_path / "cache", "--batches", "2") == 0
    assert "2 batches" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "cache")) == ["00000000.safetensors", "00000001.safetensors"]
    cached = ("--set", "data.kind=cached", "--set", f"data.path={tmp_path / 'cache'}")
    assert code_of("distill", config, *cached) == 0
    assert "result  (2 batches)" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_saves_and_says_by_its_code_that_there_is_more_to_do(config, tmp_path, number, code):
    command = [sys.executable, "-m", "vivace", "distill", str(config), "--set", "stages[0].batches=100000"]
    command += ["--set", "records.save_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        until = time.monotonic() + 120
        while not list((tmp_path / "out").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.05)
        running.send_signal(number)
        said, _ = running.communicate(timeout=60)
    assert running.returncode == code
    done = int(re.search(r"stopped after (\d+) of 100000 batches", said)[1])  # type: ignore[index]
    assert (tmp_path / "out" / f"step-{done:08d}" / "manifest.json").is_file()
    assert not (tmp_path / "out" / "result").exists()


def test_precache_as_json(config, tmp_path, capsys):
    assert code_of("distill", config, "--precache", tmp_path / "cache", "--batches", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "cache"), "batches": 1}


def test_only_the_first_of_several_processes_prints(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys.modules["vivace.cli.distill"], "EVERY", 0.0)
    assert code_of("distill", config, "--json") == 0
    assert capsys.readouterr() == ("", "")


def test_a_log_has_a_line_a_minute_with_the_time_left(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["vivace.cli.distill"], "EVERY", 0.0)
    assert code_of("distill", config) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"training 2 of 2, 0:00:00 left stage 1 dist \S+", lines[-1])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dry-run", "--precache", "cache"), "--dry-run writes nothing and --precache writes a cache; give one"),
        (("--batches", "7"), "--batches is the length of a --precache; a training's is in its stages"),
        (("--set", "studnt.rank=3"), "unknown key studnt; the nearest is student"),
        (("--set", "stages[0].steps=5"), "does not divide into 4 modes; the nearest that does is 4"),
        (("--set", "size=[60, 60]"), "size [60, 60] cannot be made: Stable Diffusion 3 and 3.5 needs multiples of 16"),
        (("--set", "teacher=/nowhere"), "no model at /nowhere"),
        (("--set", "pipeline=NoPipeline"), "no pipeline 'NoPipeline' in diffusers"),
        (("--set", "pipeline=StableDiffusion3ControlNetPipeline"), "takes a control model"),
        (("--set", "data={kind: folder, path: /nowhere}"), "no folder /nowhere"),
        (("--set", "records.trackers=[nothing]"), "trackers ['nothing'] cannot be had"),
    ],
)
def test_a_mistake_is_one_line(config, tmp_path, capsys, more, said):
    assert code_of("distill", config, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "out").exists()
