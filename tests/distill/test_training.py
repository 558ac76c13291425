"""One batch of training, and training in two processes."""

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vivace.distill import Critic, Discriminator, Optimizer, Stage, Student
from vivace.distill.student import compile_blocks, trainable
from vivace.distill.trainer import make_accelerator, make_training
from vivace.families import FAMILIES


def training_of(config, tmp_path, *, family="sd3", **fields):
    chosen = config(tmp_path, **fields)
    return make_training(chosen, make_accelerator(chosen, tmp_path), pipe=FAMILIES[family].tiny())


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


def test_a_plan_of_shards_counts_what_each_process_holds(two):
    replicas, *shards = (
        json.loads((two / name).read_text()) for name in ("ddp-memory-0", "fsdp-memory-0", "fsdp-memory-1")
    )
    for name in ("student", "its gradients and AdamW's moments", "running mean"):
        assert sum(one[name] for one in shards) == replicas[name]
        assert max(one[name] for one in shards) < replicas[name]
    frozen = sum(one["a shard of the student's frozen weights"] for one in shards)
    assert frozen == sum(weight.nbytes for weight in FAMILIES["sd3"].tiny().transformer.parameters())
    assert not any("8" in name for one in (replicas, *shards) for name in one)


def test_processes_train_again_and_on_what_they_wrote_beforehand(two):
    assert len(list((two / "cache").glob("*.safetensors"))) == 3
    assert (two / "from-cache" / "result" / "pytorch_lora_weights.safetensors").is_file()


def test_what_any_process_left_out_is_counted(two):
    (newest,) = (two / "halved").glob("step-*8")
    own = [one["skipped"]["no caption"] for one in json.loads((newest / "state.json").read_text())["data"]]
    assert min(own) > 0
    assert [json.loads((two / f"skipped-{rank}").read_text()) for rank in range(2)] == 2 * [{"no caption": sum(own)}]


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
    now = list(training.learners["discriminator"].plain.parameters())
    before = [p.detach().clone() for p in now]
    training.batch()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    training.done = 2  # the second stage
    training.batch()
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_no_discriminator_where_no_stage_asks(config, tmp_path):
    training = training_of(config, tmp_path, stages=(Stage(batches=1, steps=4),))
    assert "discriminator" not in training.learners
    assert set(training.tensors()) == {"student", "student-moments"}


def test_the_critic_learns_what_the_student_draws(config, tmp_path):
    stages = (Stage(batches=90, steps=4, guidance=(2.0, 2.0), modes=(1.0, 0, 0, 0), matching=0.5),)
    still = {"student": Student(rank=8, targets=("net.2", "proj_out")), "optimizer": Optimizer(lr=0.0)}
    training = training_of(config, tmp_path, stages=stages, critic=Critic(rank=8, lr=2e-2, updates=3), **still)
    objective, critic = training.objective, training.learners["critic"].plain
    item = training.draw()[1]
    start = objective.start(item, stages[0], training.plain, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def error(denoiser):
        picture = objective.predict(training.plain, start, item)
        draws = (torch.Generator().manual_seed(seed) for seed in range(8))
        return sum(float(objective.denoising(denoiser, picture, item, start, draw)) for draw in draws) / 8

    assert error(critic) == pytest.approx(error(training.plain))  # both begin as the teacher
    for _ in range(15):
        training.batch()
    assert error(critic) < 0.98 * error(training.plain)
    assert set(training.tensors()) == {"student", "student-moments", "critic", "critic-moments"}


def test_a_stage_without_matching_leaves_the_critic(config, tmp_path):
    training = training_of(config, tmp_path, critic=Critic(rank=2, lr=1e-3))
    now = list(trainable(training.learners["critic"].plain).values())
    before = [p.detach().clone() for p in now]
    assert training.batch()["critic"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    training.done = 2  # the second stage
    assert training.batch()["critic"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_consistency_follows_the_running_mean(config, tmp_path):
    """The target is predicted with the mean as weights, and the student has its own again afterwards."""
    student, stages = Student(rank=4, ema=0.9), (Stage(batches=4, steps=8, guidance=(2.0, 2.0)),)
    training = training_of(config, tmp_path, method="consistency", timesteps="uniform", student=student, stages=stages)
    generator, item = training.draw()
    start = training.objective.start(item, training.stage, training.plain, generator)
    with torch.no_grad():
        for parameter in trainable(training.plain).values():
            parameter.add_(0.3)
    assert training.mean is not None
    target = training.target(item, start, training.stage)
    own = training.objective.target(item, start, training.cast(training.plain))
    with training.mean.inside(training.plain):
        of_mean = training.objective.target(item, start, training.cast(training.plain))
    assert torch.equal(target, of_mean)
    assert not torch.allclose(target, own, atol=1e-3)
    assert all(
        float(p.detach().abs().max()) >= 0.3 for name, p in trainable(training.plain).items() if "lora_B" in name
    )


def test_a_critic_that_is_not_finite_stops_the_training(config, tmp_path):
    training = training_of(config, tmp_path, critic=Critic(rank=2, lr=1e-3))
    training.done = 2  # the second stage
    student = [p.detach().clone() for p in training.plain.parameters()]
    with torch.no_grad():
        next(iter(trainable(training.learners["critic"].plain).values())).fill_(math.inf)
    assert math.isnan(training.batch()["critic"])
    assert all(torch.equal(a, b) for a, b in zip(student, training.plain.parameters(), strict=True))


@pytest.fixture
def few_compilations():
    """SDXL's blocks at true size need more compilations than torch allows, tiny ones more than this."""
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.usefixtures("few_compilations")
@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_compiled_blocks_learn_the_same(config, tmp_path, monkeypatch, family):
    """With the backend that runs eagerly what was traced: the graphs are what compiling could get wrong here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    stages = (Stage(batches=1, steps=4, guidance=(2.0, 2.0), matching=0.5),)
    student, found = Student(rank=4, gradient_checkpointing=True), []
    for compiled in (False, True):
        training = training_of(config, tmp_path, family=family, stages=stages, student=student, critic=Critic(rank=2))
        if compiled:
            for learner in ("student", "critic"):
                compile_blocks(training.learners[learner].plain, FAMILIES[family])
        blocks = [module for module in training.plain.modules() if module._compiled_call_impl is not None]
        assert bool(blocks) == compiled
        found.append(training.batch())
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_in_bfloat16_every_backbones_lora_trains_without_autocast(config, tmp_path, backbone):
    pipe, conditioners = backbone
    stages = (Stage(batches=1, steps=4, guidance=(2.0, 4.0), matching=0.5, adversarial=0.3),)
    chosen = config(tmp_path, stages=stages, precision="bfloat16", conditioners=conditioners)
    training = make_training(chosen, make_accelerator(chosen, tmp_path), pipe=pipe.to(torch.bfloat16))
    assert not training.autocast
    losses = training.batch()
    assert all(map(math.isfinite, losses.values()))
    assert losses["distillation"] > 0
    assert training.done == 1


def test_on_a_cpu_nothing_is_compiled(config, tmp_path):
    training = training_of(config, tmp_path, student=Student(rank=4, compile=True))
    assert all(module._compiled_call_impl is None for module in training.plain.modules())


def test_wasserstein_clips(config, tmp_path):
    training = training_of(config, tmp_path, discriminator=Discriminator(loss="wasserstein"))
    training.done = 2
    training.batch()
    assert max(float(p.detach().abs().max()) for p in training.learners["discriminator"].plain.parameters()) <= 0.01


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
        rates.append(training.learners["student"].optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4])


def test_learning_rates_fall(config, tmp_path):
    stages = (Stage(batches=4, steps=4, guidance=(2.0, 2.0)),)
    training = training_of(config, tmp_path, stages=stages, optimizer=Optimizer(lr=1e-3, decay=2))
    rates = []
    for _ in range(4):
        training.batch()
        rates.append(training.learners["student"].optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
