"""One batch of training, and training in two processes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vivace.distill import Discriminator, Optimizer, Stage
from vivace.distill.trainer import make_accelerator, make_training
from vivace.families import FAMILIES


def training_of(config, tmp_path, **fields):
    chosen = config(tmp_path, **fields)
    return make_training(chosen, make_accelerator(chosen, tmp_path), pipe=FAMILIES["sd3"].tiny())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes hold at the end, replicated and sharded: a folder."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).parent / "two_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_agree_and_resume_exactly(two, kind):
    straight = [load_file(two / f"{kind}-straight-{rank}") for rank in range(2)]
    resumed = load_file(two / f"{kind}-resumed-0")
    for name, value in straight[0].items():
        assert torch.equal(value, straight[1][name]), name
        assert torch.equal(value, resumed[name]), name


def test_shards_learn_what_replicas_learn(two):
    replicas, shards = (load_file(two / f"{kind}-straight-0") for kind in ("ddp", "fsdp"))
    assert replicas.keys() == shards.keys()
    for name, value in replicas.items():
        assert torch.allclose(value, shards[name], atol=1e-4), name


def test_a_sharded_training_leaves_everything(two):
    assert {file.name for file in (two / "run").iterdir()} == {"samples", "result", "step-00000002", "step-00000004"}
    weights = load_file(two / "run" / "result" / "pytorch_lora_weights.safetensors")
    mean = load_file(two / "run" / "step-00000004" / "mean.safetensors")
    assert len(weights) == len(mean) > 0


def test_accumulated_gradients_are_the_mean(config, tmp_path):
    """Two parts of one batch give the mean of their gradients."""
    stages = (Stage(batches=1, steps=4, guidance=(2.0, 2.0)),)
    training = training_of(config, tmp_path, stages=stages, optimizer=Optimizer(accumulate=2))
    stage = training.stage
    found = []
    for parts in ((0,), (1,), (0, 1)):
        training.supply.load({"number": parts[0]})
        for part in parts:
            generator, item = training.draw(part)
            training.losses(item, stage, generator, last=True)
        found.append([p.grad.clone() for p in training.plain.parameters() if p.grad is not None])
        training.forget()
    for first, second, both in zip(*found, strict=True):
        assert torch.allclose(first + second, both, atol=1e-7)


def test_a_stage_without_an_adversary_leaves_the_discriminator(config, tmp_path):
    training = training_of(config, tmp_path)
    before = [p.detach().clone() for p in training.discriminator.parameters()]
    training.batch()
    assert all(torch.equal(a, b) for a, b in zip(before, training.discriminator.parameters(), strict=True))
    training.done = 2  # the second stage
    training.batch()
    assert not any(torch.equal(a, b) for a, b in zip(before, training.discriminator.parameters(), strict=True))


def test_no_discriminator_where_no_stage_asks(config, tmp_path):
    training = training_of(config, tmp_path, stages=(Stage(batches=1, steps=4),))
    assert training.discriminator is None
    assert set(training.tensors()) == {"student", "student-moments"}


def test_wasserstein_clips(config, tmp_path):
    training = training_of(config, tmp_path, discriminator=Discriminator(loss="wasserstein"))
    training.done = 2
    training.batch()
    assert max(float(p.detach().abs().max()) for p in training.discriminator.parameters()) <= 0.01


def test_one_rollout_serves_both_updates(config, tmp_path):
    training = training_of(config, tmp_path, discriminator=Discriminator(real="teacher"))
    training.done = 2
    stage = dataclasses.replace(training.stage, matching=0.0)
    generator, item = training.draw()
    start = training.objective.start(item, stage, training.cast(training.plain), generator)
    calls = []
    hook = training.actors.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    target = training.target(item, start, stage)
    training.updates(item, start, target, stage, generator)
    hook.remove()
    assert len(calls) == len(start.grid) - 1


def test_learning_rates_rise(config, tmp_path):
    training = training_of(config, tmp_path, optimizer=Optimizer(lr=1e-3, warmup=4))
    rates = []
    for _ in range(3):
        training.batch()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4])


def test_learning_rates_fall(config, tmp_path):
    stages = (Stage(batches=4, steps=4, guidance=(2.0, 2.0)),)
    training = training_of(config, tmp_path, stages=stages, optimizer=Optimizer(lr=1e-3, decay=2))
    rates = []
    for _ in range(4):
        training.batch()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
