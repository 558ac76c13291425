"""Training as a whole: resumption to the bit, stops, and what is refused."""

import dataclasses
import gc
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vivace.distill import Critic, Data, Optimizer, Records, Stage, Student, checkpoint, train
from vivace.distill.trainer import differences
from vivace.errors import InputError
from vivace.families import FAMILIES

QUIET = {"trackers": (), "sample_every": 0}


def teacher():
    return FAMILIES["sd3"].tiny()


def weights(folder, number, name="student"):
    return load_file(folder / f"step-{number:08d}" / f"{name}.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def ten(config, tmp_path_factory):
    """Ten batches in one go, with a checkpoint at five: the config and the folder."""
    folder = tmp_path_factory.mktemp("ten")
    records = Records(save_every=5, **QUIET)
    student = Student(rank=4, ema=0.9)
    learning = {"optimizer": Optimizer(lr=1e-3, accumulate=2, warmup=3), "critic": Critic(rank=2, lr=1e-3)}
    chosen = config(folder, records=records, student=student, **learning)
    train(chosen, pipe=teacher())
    return chosen, folder


def test_ten_batches_equal_five_and_five(ten, tmp_path):
    chosen, folder = ten
    half = dataclasses.replace(chosen, output=str(tmp_path))
    stop_at = 5

    def stop(progress):
        if progress.done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    first = train(half, pipe=teacher(), on_batch=stop)
    assert first.stopped
    assert (first.done, first.folder) == (5, None)
    assert first.checkpoint.is_dir()
    second = train(half, pipe=teacher())
    assert (second.done, second.stopped) == (10, False)
    learnt = [name + kind for name in ("student", "discriminator", "critic") for kind in ("", "-moments")]
    for name in (*learnt, "mean"):
        assert same(weights(folder, 10, name), weights(tmp_path, 10, name)), name
    assert not same(weights(folder, 5), weights(folder, 10))


def test_twenty_kills_while_saving_change_nothing(tmp_path):
    """A training that was killed with SIGKILL in the middle of its saves ends as one that never was."""
    script = Path(__file__).parent / "kill_while_saving.py"
    plan = runpy.run_path(str(script))
    killed = subprocess.run([sys.executable, script, tmp_path / "killed"], capture_output=True, text=True, check=True)
    assert int(killed.stdout) == plan["KILLS"]
    train(plan["config"](tmp_path / "whole"), pipe=teacher())
    for name in ("student", "student-moments", "mean"):
        assert same(weights(tmp_path / "killed", 60, name), weights(tmp_path / "whole", 60, name)), name
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["result", "step-00000059", "step-00000060"]


def test_the_state_says_where_it_stands(ten):
    chosen, folder = ten
    _, state = checkpoint.load(folder / "step-00000005")
    assert (state["done"], state["stage"], state["processes"]) == (5, 1, 1)
    assert state["data"] == [{"number": 10}]  # two parts a batch
    assert state["config"] == chosen.to_dict()


def test_training_learns(config, tmp_path):
    stages = (Stage(batches=25, steps=4, guidance=(3.0, 3.0), modes=(0, 0, 0, 1.0)),)
    losses = []
    chosen = config(tmp_path, stages=stages, optimizer=Optimizer(lr=5e-3), records=Records(save_every=100, **QUIET))
    train(chosen, pipe=teacher(), on_batch=lambda progress: losses.append(progress.losses["distillation"]))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_collector_passes_over_what_was_there_and_afterwards_does_as_before(config, tmp_path, frozen):
    seen = []
    stages = (Stage(batches=1, steps=4, guidance=(2.0, 2.0)),)
    chosen = config(tmp_path, stages=stages, records=Records(save_every=5, **QUIET))
    gc.unfreeze()
    try:
        if frozen:
            gc.freeze()
        train(chosen, pipe=teacher(), on_batch=lambda _: seen.append(gc.get_freeze_count()))
        assert seen[0] > 10_000
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.freeze()  # as all tests run


def test_another_config_is_refused_with_what_differs(ten):
    chosen, folder = ten
    other = dataclasses.replace(chosen, optimizer=dataclasses.replace(chosen.optimizer, lr=1e-4), batch=3)
    with pytest.raises(InputError, match=r"batch: 2 -> 3; optimizer\.lr: 0\.001 -> 0\.0001"):
        train(other, pipe=teacher())
    assert checkpoint.latest(folder) == folder / "step-00000010"


def test_what_no_weight_depends_on_may_differ(config):
    one = config("a", records=Records(save_every=5, **QUIET))
    spared = Student(rank=4, gradient_checkpointing="auto")
    other = config("b", records=Records(save_every=7, keep=9, **QUIET), student=spared)
    assert differences(one.to_dict(), other.to_dict()) == []
    wider = dataclasses.replace(other, student=Student(rank=8))
    assert differences(one.to_dict(), wider.to_dict()) == ["student.rank: 4 -> 8"]


def test_of_stages_only_what_differs_is_said(config):
    one = config()
    first, last = one.stages
    other = config(stages=(first, dataclasses.replace(last, matching=0.25, guidance=(2.0, 5.0))))
    said = ["stages[1].guidance: [2.0, 4.0] -> [2.0, 5.0]", "stages[1].matching: 0.5 -> 0.25"]
    assert differences(one.to_dict(), other.to_dict()) == said
    (whole,) = differences(one.to_dict(), config(stages=(first,)).to_dict())
    assert whole == "stages: 2 of them -> 1"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(config, tmp_path, monkeypatch):
    from vivace.distill import losses

    count = []

    def sometimes(a, b):
        count.append(1)
        return (a - b).square().mean() * (float("nan") if len(count) == 4 else 1.0)

    monkeypatch.setitem(losses.DISTANCES, "l2", sometimes)
    chosen = config(tmp_path, records=Records(save_every=2, **QUIET))
    with pytest.raises(
        InputError, match=r"distillation loss of batch 4 is nan; the last good checkpoint is .*00000002"
    ):
        train(chosen, pipe=teacher())
    assert all(value.isfinite().all() for value in weights(tmp_path, 2).values())


def test_weights_that_are_not_finite_are_never_saved(config, tmp_path, monkeypatch):
    """A loss can be fine where its gradient is not; the next loss would tell, after the save."""
    from vivace.distill import losses

    def steep(a, b):
        return (a - b).square().mean() + (0 * (a - b)).square().sum().sqrt()

    monkeypatch.setitem(losses.DISTANCES, "l2", steep)
    chosen = config(tmp_path, records=Records(save_every=1, **QUIET))
    with pytest.raises(InputError, match=r"after batch 1 the values of student are not finite; no checkpoint was writ"):
        train(chosen, pipe=teacher())
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_stop_after_a_save_does_not_save_again(config, tmp_path):
    """To write it anew would be to remove it first: with keep=1 a kill in between would leave none."""
    chosen = config(tmp_path, records=Records(save_every=2, keep=1, **QUIET))
    saved = []

    def stop(progress):
        if progress.done == 2:
            saved.append((tmp_path / "step-00000002").stat().st_ino)
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(chosen, pipe=teacher(), on_batch=stop)
    assert (result.done, result.checkpoint) == (2, tmp_path / "step-00000002")
    assert [result.checkpoint.stat().st_ino] == saved


def test_what_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file cannot be made a folder \(File exists\)"):
        train(config(tmp_path / "file"), pipe=teacher())
    run = tmp_path / "run"
    run.mkdir()
    (run / "samples").touch()  # a full disk refuses a folder too
    records = Records(trackers=(), sample_every=1, prompts=("a red ring",), steps=(1,))
    with pytest.raises(InputError, match=r"samples/00000001\.png cannot be written .*; make room and start again"):
        train(config(run, records=records), pipe=teacher())


FULL = """
import resource, sys
from pathlib import Path
from vivace.distill import Data, DistillConfig, Records, Stage, Student, train
from vivace.errors import InputError
from vivace.families import FAMILIES

def fill(progress):
    if progress.done == 3:
        held = max(file.stat().st_size for file in Path(sys.argv[1], "logs").rglob("events*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (held, held))

stages = (Stage(batches=20, steps=4, guidance=(2.0, 3.0)),)
records = Records(sample_every=0, save_every=2)
own = dict(size=(64, 64), data=Data(kind="builtin"), student=Student(rank=4), batch=1, accelerate=None)
try:
    config = DistillConfig(output=sys.argv[1], stages=stages, records=records, **own)
    train(config, pipe=FAMILIES["sd3"].tiny(), on_batch=fill)
except InputError as error:
    print(error)
"""


def test_a_log_that_cannot_be_written_stops_with_one_line(tmp_path):
    """A full disk is met by the log first, which grows with every batch."""
    pytest.importorskip("tensorboard")
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    left = r"the last good checkpoint is \S+step-00000002; make room and start again"
    assert re.fullmatch(rf"the log of batch [45] cannot be written \(File too large\); {left}\n", done.stdout)


def test_checkpoints_that_are_all_broken_are_not_trained_over(ten, tmp_path):
    shutil.copytree(ten[1], tmp_path, dirs_exist_ok=True)
    for path in checkpoint.checkpoints(tmp_path):
        (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(InputError, match="holds no checkpoint that is whole; mend one, or give another output"):
        train(dataclasses.replace(ten[0], output=str(tmp_path)), pipe=teacher())


def test_a_result_and_a_log_are_written(config, tmp_path):
    pytest.importorskip("tensorboard")
    stages = (Stage(batches=2, steps=4, guidance=(2.0, 3.0)),)
    records = Records(prompts=("a red ring", "a blue star"), sample_every=1, steps=(2, 1))
    result = train(config(tmp_path, stages=stages, records=records), pipe=teacher())
    assert result.folder is not None
    assert (result.folder / "pytorch_lora_weights.safetensors").is_file()
    assert list((tmp_path / "logs").glob("events*"))
    from PIL import Image

    with Image.open(tmp_path / "samples" / "00000002.png") as grid:
        assert grid.size == (2 * 64, 2 * 64)


def test_a_finished_training_does_nothing_more(ten):
    chosen, folder = ten
    before = weights(folder, 10)
    result = train(chosen, pipe=teacher())
    assert (result.done, result.stopped) == (10, False)
    assert same(before, weights(folder, 10))


def test_resume_off_does_not_overwrite(ten):
    with pytest.raises(InputError, match="holds checkpoints of another run"):
        train(ten[0], pipe=teacher(), resume=False)


def test_a_tracker_that_is_not_installed_is_no_silent_loss(config, tmp_path):
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    here = {str(one.value) for one in get_available_trackers()}
    missing = next(str(one.value) for one in LoggerType if one.value not in here | {"all"})
    with pytest.raises(InputError, match=f"trackers has {missing}, which is not installed; pip install {missing}"):
        train(config(tmp_path, records=Records(trackers=(missing,), sample_every=0)), pipe=teacher())
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_the_guidance_asked(config, tmp_path):
    from diffusers import FluxTransformer2DModel

    from vivace.families import flux

    pipe = FAMILIES["flux"].tiny()
    pipe.register_modules(transformer=FluxTransformer2DModel(**{**flux.TINY, "guidance_embeds": False}))
    with pytest.raises(InputError, match=r"teacher has no guidance in its call, and stages ask for \[2\.0, 4\.0\]"):
        train(config(tmp_path), pipe=pipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_keeps_the_learnt_weights_in_float32(config, tmp_path, kind):
    stages = (Stage(batches=2, steps=4, guidance=(2.0, 3.0), matching=0.5, adversarial=0.3),)
    records = Records(trackers=(), sample_every=2, prompts=("a red ring",), steps=(2,))
    chosen = config(tmp_path, stages=stages, precision="bfloat16", student=Student(kind=kind, rank=4), records=records)
    before = teacher().to(torch.bfloat16)
    result = train(chosen, pipe=before)
    assert result.done == 2
    learnt = weights(tmp_path, 2)
    assert {value.dtype for value in learnt.values()} == {torch.float32}
    assert (tmp_path / "samples" / "00000002.png").is_file()
    assert next(before.transformer.parameters()).dtype == torch.bfloat16


def test_an_accelerated_teacher_teaches_the_same(config, tmp_path):
    """The fast lane's rollout, through the fused blocks of this family, moves the student as the stock one does."""
    stages = (Stage(batches=2, steps=4, guidance=(2.0, 3.0), matching=0.5, adversarial=0.3),)
    results = []
    for name, preset in (("stock", None), ("fast", "exact")):
        pipe = teacher()
        train(config(tmp_path / name, stages=stages, accelerate=preset), pipe=pipe)
        results.append(weights(tmp_path / name, 2))
        assert (type(pipe.transformer).__dict__.get("vivace_acceleration") is not None) == (preset is not None)
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-5) for name in results[0])


def test_every_backbone_trains_to_a_result(config, tmp_path, backbone):
    pipe, conditioners = backbone
    stages = (Stage(batches=1, steps=4, guidance=(2.0, 3.0), matching=0.5, adversarial=0.3),)
    chosen = config(tmp_path, stages=stages, conditioners=conditioners, student=Student(rank=4, ema=0.9))
    result = train(chosen, pipe=pipe)
    assert result.folder is not None
    assert {file.name for file in result.folder.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "scheduler",
        "vivace.json",
    }
    assert all(result.losses[name] != 0 for name in ("distillation", "adversarial", "discriminator"))


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16_with_the_fast_lane(config, tmp_path):
    """Every loss, a grid and a resumption on the GPU, with whatever the preset exact records or fuses there."""
    records = Records(trackers=(), sample_every=5, save_every=5, prompts=("a red ring",), steps=(4,))
    chosen = config(tmp_path, accelerate="exact", records=records, student=Student(rank=4, ema=0.9))
    seen = []

    def stop(progress):
        seen.append(progress.losses)
        if progress.done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(chosen, pipe=teacher().to(torch.bfloat16), on_batch=stop).stopped
    assert train(chosen, pipe=teacher().to(torch.bfloat16)).done == 10
    assert all(loss == loss for losses in seen for loss in losses.values())
    assert all(value.isfinite().all() for value in weights(tmp_path, 10).values())


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (Data(kind="shards", path="nowhere/{0..3}.tar"), r"no shard nowhere/0.tar \(4 of 4 are missing\)"),
        (Data(kind="folder", path="nowhere"), "no folder nowhere"),
        (Data(kind="cached", path="nowhere"), "nowhere holds no batches"),
    ],
)
def test_data_that_are_not_there_are_told_before_a_teacher_is_looked_for(config, tmp_path, data, told):
    with pytest.raises(InputError, match=told):
        train(config(tmp_path / "out", data=data, teacher="no/such-teacher"))
    assert not (tmp_path / "out").exists()
