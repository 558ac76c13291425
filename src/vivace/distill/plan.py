"""What a distillation would take, measured: one batch of every stage is run, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vivace.distill.config import DistillConfig, Stage
from vivace.distill.objective import Start
from vivace.distill.stages import mixture, steps_before
from vivace.distill.student import trainable
from vivace.distill.trainer import make_accelerator, make_training
from vivace.distill.training import Training
from vivace.distill.weights import local

MEASURED = 2  # solver steps of the rollout that are run
WARM_UP = 3  # batches of each stage before one counts: compiled blocks see every shape, and those that vary, by then
CPU_BATCH = 2  # a CPU takes as many times longer as a batch is larger, so a small one tells


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage as measured."""

    batches: int
    steps: int  # K
    teacher_calls: float  # expected for a batch, each with both halves
    seconds: float  # for a batch
    rollout: float  # its share of that
    pictures_per_second: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training takes on this machine."""

    stages: tuple[StagePlan, ...]
    memory: dict[str, int]  # bytes by what holds them
    peak: int | None  # bytes allocated at most on the GPU; None on the CPU
    device: str
    processes: int

    @property
    def hours(self) -> float:
        """Of all stages, without samples and checkpoints."""
        return sum(stage.batches * stage.seconds for stage in self.stages) / 3600

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "hours": self.hours}


def make_plan(config: DistillConfig, *, pipe: Any = None, repeats: int = 1) -> Plan:
    """Measure a training: `repeats` batches of each stage, after some to warm up. Raises InputError as `train`.

    On a CPU small batches are measured, and taken as often as it needs for the pictures of a large one.
    """
    accelerator = make_accelerator(config, Path(config.output))
    cuda = accelerator.device.type == "cuda"
    # Batches that lie ready have a size of their own.
    whole = cuda or config.data.kind == "cached"
    measured = config if whole else replace(config, batch=min(config.batch, CPU_BATCH))
    training = make_training(measured, accelerator, pipe=pipe)
    parts = config.batch / measured.batch
    stages = tuple(_measure(training, stage, repeats=repeats, parts=parts) for stage in config.stages)
    return Plan(
        stages=stages,
        memory=memory(training),
        peak=torch.cuda.max_memory_allocated() if cuda else None,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        processes=accelerator.num_processes,
    )


def teacher_calls(config: DistillConfig, stage: Stage) -> float:
    """How often the teacher is expected to be called in one batch's rollout."""
    if not config.rolls_out(stage):
        return 0.0
    if config.method == "consistency":
        return 1.0
    odds = mixture(stage, kind=config.timesteps)
    return float((odds * (stage.steps - torch.arange(stage.steps))).sum())


def student_calls(config: DistillConfig, stage: Stage) -> float:
    """How often the student is expected to be called for one batch's simulated start."""
    odds = mixture(stage, kind=config.timesteps).tolist()
    return stage.simulated * sum(share * len(steps_before(stage, index)) for index, share in enumerate(odds))


def _measure(training: Training, stage: Stage, *, repeats: int, parts: float) -> StagePlan:
    """A stage with batches `parts` times as large as the training's own."""
    warm_up = WARM_UP if training.config.student.compile and training.accelerator.device.type == "cuda" else 1
    for _ in range(warm_up):
        _batch(training, stage)
    runs = [_batch(training, stage) for _ in range(repeats)]
    rollout, simulating, rest, step = (sum(seconds) / repeats for seconds in zip(*runs, strict=True))
    accumulate, expected = training.config.optimizer.accumulate, teacher_calls(training.config, stage)
    rest += student_calls(training.config, stage) * simulating
    total = accumulate * parts * (expected * rollout + rest) + step
    pictures = training.config.batch * parts * accumulate * training.accelerator.num_processes
    return StagePlan(
        batches=stage.batches,
        steps=stage.steps,
        teacher_calls=expected,
        seconds=total,
        rollout=accumulate * parts * expected * rollout / total,
        pictures_per_second=pictures / total,
    )


def _batch(training: Training, stage: Stage) -> tuple[float, float, float, float]:
    """Seconds of one teacher call of the rollout, of one student call of a simulated start, of all else in a batch, and
    of the optimizers' step.
    """
    drawing, (generator, item) = _timed(training, training.draw)
    student = training.cast(training.plain)
    begin = partial(training.objective.start, choices=training.choices())
    plain = replace(stage, simulated=0.0)
    starting, start = _timed(training, lambda: begin(item, plain, student, generator))
    simulating = 0.0
    if stage.simulated:
        # One step, from the start's level to itself.
        levels = start.grid[[0, 0, -1]]
        simulate = partial(training.objective.simulated, item, levels, start.guidance, student)
        simulating, _ = _timed(training, lambda: simulate(generator))
    # Every step of the solver takes as long as the next: two of them tell, as those between the exact ends are.
    start = replace(start, grid=start.grid[: MEASURED + 1], ends=Start.ends)
    rollout, target = _timed(training, lambda: training.target(item, start, stage))
    calls = 1 if training.config.method == "consistency" else len(start.grid) - 1
    updating, _ = _timed(training, lambda: training.updates(item, start, target, stage, generator))
    # The first step makes AdamW's moments, which the most that is allocated has to hold.
    stepping, _ = _timed(training, lambda: training.step(stage))
    training.forget()
    return rollout / calls, simulating, drawing + starting + updating, stepping


def _timed(training: Training, work: Callable[[], Any]) -> tuple[float, Any]:
    start = _now(training)
    found = work()
    return _now(training) - start, found


def _now(training: Training) -> float:
    if training.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(training: Training) -> dict[str, int]:
    """Bytes of what stays in one process's memory: the pipeline's weights, what is trained, and its optimizers."""
    pipe = training.actors.pipe
    parts = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    found = {name: _bytes([*part.parameters(), *part.buffers()]) for name, part in parts.items()}
    kept = {parameter.data_ptr() for part in parts.values() for parameter in part.parameters()}
    frozen = [one for one in training.student.parameters() if not one.requires_grad and one.data_ptr() not in kept]
    if frozen:
        whose = (
            "a shard of the student's frozen weights" if training.sharded else "weights in 16 bit, of a teacher in 8"
        )
        found[whose] = _bytes(frozen)
    learnt = _bytes(trainable(training.student).values())  # in float32, as all that goes with them
    found["student"] = learnt
    found["its gradients and AdamW's moments"] = 3 * learnt
    if training.mean is not None:
        found["running mean"] = learnt
    for name, learner in training.learners.items():
        if name != "student":
            found[f"{name}, with the same"] = 4 * _bytes(trainable(learner.plain).values())
    return found


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Of what this process holds of them."""
    return sum(local(one).nbytes for one in parameters)
