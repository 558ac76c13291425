"""The state of a training and one batch of it; `trainer.py` has the loop around it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vivace.distill.actors import Actors
from vivace.distill.config import Stage
from vivace.distill.data import Supply
from vivace.distill.discriminator import clamp
from vivace.distill.learner import Learner, make_learner
from vivace.distill.losses import GAMES
from vivace.distill.low_rank import cast_at_once
from vivace.distill.mean import Mean
from vivace.distill.objective import Item, Start
from vivace.distill.stages import stage_at
from vivace.distill.student import casts_itself, trainable
from vivace.distill.weights import load_moments, load_weights, moments_of, shard, weights_of, whole

LOSSES = ("distillation", "matching", "adversarial", "discriminator", "critic")


class Training:
    """Student, discriminator and critic, the running mean, the data, and how many batches are done."""

    def __init__(self, actors: Actors, supply: Supply, accelerator: Accelerator) -> None:
        config = actors.config
        self.actors, self.supply, self.accelerator, self.config = actors, supply, accelerator, config
        self.objective = actors.objective
        self.done = 0
        self.shown: Item | None = None  # of sample grids with conditions
        self.sharded = config.parallel == "fsdp" and accelerator.num_processes > 1
        if self.sharded:
            student = actors.student.to(accelerator.device)
            shard(student, [block.module for block in actors.family.split(student).blocks])
        self.learners = self._learners()
        self.mean = Mean(self.plain, config.student.ema) if config.student.ema else None
        bfloat16 = config.computes_in(accelerator.device.type) == "bfloat16"
        denoisers = [learner.plain for name, learner in self.learners.items() if name != "discriminator"]
        self.autocast = bfloat16 and not all(casts_itself(one, torch.bfloat16) for one in denoisers)
        if not self.autocast and not self.sharded:
            for one in denoisers:
                cast_at_once(one)

    def _learners(self) -> dict[str, Learner]:
        """What is trained, by its name in checkpoints."""
        config, actors = self.config, self.actors
        make = partial(make_learner, accelerator=self.accelerator, config=config.optimizer)
        found = {"student": make(actors.student, lr=config.optimizer.lr, wrapped=not self.sharded)}
        if actors.discriminator is not None:
            found["discriminator"] = make(actors.discriminator, lr=config.discriminator.lr)
        if actors.critic is not None and config.critic is not None:
            found["critic"] = make(actors.critic, lr=config.critic.lr)
        return found

    @property
    def student(self) -> Any:
        """The student, for calls with a gradient."""
        return self.learners["student"].module

    @property
    def plain(self) -> nn.Module:
        """The student without what several processes wrap it in: for calls without a gradient."""
        return self.learners["student"].plain

    @property
    def stage_number(self) -> int:
        """Which stage the next batch belongs to, from 0."""
        return stage_at(self.config.stages, self.done)

    @property
    def stage(self) -> Stage:
        """The stage of the next batch."""
        return self.config.stages[self.stage_number]

    def cast(self, module: nn.Module) -> Callable[..., Any]:
        """The module's call in the precision of the forward passes; its own weights are float32."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.autocast):
                return module(*args, **kwargs)

        return call

    def batch(self) -> dict[str, float]:
        """One optimizer step of the student, and those of discriminator and critic where the stage has them.

        Returns the mean losses. Everything random comes from a generator that this batch seeds from (seed, process,
        batch), so no generator's state has to be kept. Weights are left as they were where a loss is not finite.
        """
        stage = self.stage
        sums = torch.zeros(len(LOSSES), device=self.accelerator.device)
        self._set_rates()
        for part in range(self.config.optimizer.accumulate):
            generator, item = self.draw(part)
            # Only the last part's gradients have to meet those of other processes.
            last = part + 1 == self.config.optimizer.accumulate
            for name, loss in self.losses(item, stage, generator, part=part, last=last).items():
                sums[LOSSES.index(name)] += loss / self.config.optimizer.accumulate
        losses = self._reduced(sums)
        if all(map(math.isfinite, losses.values())):
            self.step(stage)
            self.done += 1
        self.forget()
        return losses

    def draw(self, part: int = 0) -> tuple[torch.Generator, Item]:
        """The generator and the item of part `part` of the next batch."""
        device = self.accelerator.device
        seed = random.Random(f"{self.config.seed}/{self.accelerator.process_index}/{self.done}/{part}").getrandbits(63)
        # Also torch's own generator, for whatever a pipeline or a conditioner draws from it.
        torch.manual_seed(seed)
        found = next(self.supply)
        item = found if isinstance(found, Item) else self.actors.prepare(found, seed=seed)
        return torch.Generator(device).manual_seed(seed), item

    def choices(self, part: int = 0) -> torch.Generator:
        """Draws the level and guidance of part `part` of the next batch, the same in every process.

        So the processes call teacher and student equally often: none waits for another's longer rollout, and shards of
        the student are gathered by all at once.
        """
        seed = random.Random(f"{self.config.seed}/{self.done}/{part}").getrandbits(63)
        return torch.Generator().manual_seed(seed)

    def losses(
        self, item: Item, stage: Stage, generator: torch.Generator, *, part: int = 0, last: bool
    ) -> dict[str, torch.Tensor]:
        """Both updates' losses on one item, with their gradients added up; one rollout serves both."""
        choices = self.choices(part)
        start = self.objective.start(item, stage, self.cast(self.plain), generator, choices=choices)
        target = self.target(item, start, stage)
        return self.updates(item, start, target, stage, generator, last=last)

    def target(self, item: Item, start: Start, stage: Stage) -> torch.Tensor:
        """Where the teacher goes from `start`; the data itself where no loss of the stage asks for the teacher.

        In consistency distillation the student that predicts from there has its running mean as weights: after its own
        latest ones it would follow itself anywhere (arXiv 2310.04378).
        """
        if not self.config.rolls_out(stage):
            return item.z
        follows = self.mean is not None and self.config.method == "consistency"
        with self.mean.inside(self.plain) if self.mean and follows else nullcontext():
            return self.objective.target(item, start, self.cast(self.plain))

    def updates(
        self,
        item: Item,
        start: Start,
        target: torch.Tensor,
        stage: Stage,
        generator: torch.Generator,
        *,
        last: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The student's losses and then the discriminator's, with their gradients; the host reads none of them here."""
        objective = self.objective
        parts: dict[str, tuple[float, torch.Tensor]] = {}
        student, plain = self.cast(self.student), self.cast(self.plain)
        with self._synchronised(self.student, last):
            picture = objective.predict(student, start, item)
            if stage.distillation:
                parts["distillation"] = (stage.distillation, objective.distance(picture, target, item, start))
            if stage.matching:
                critic = self.cast(self.learners["critic"].plain) if "critic" in self.learners else plain
                parts["matching"] = (stage.matching, objective.matching(picture, item, stage, critic, generator))
            if stage.adversarial:
                judge = self.learners["discriminator"].plain
                parts["adversarial"] = (stage.adversarial, objective.fooling(judge, picture, item, start, generator))
            self._backward(torch.stack([weight * loss for weight, loss in parts.values()]).sum())
        found = {name: loss.detach() for name, (_, loss) in parts.items()}
        if stage.adversarial:
            real = target if self.config.discriminator.real == "teacher" else item.z
            found["discriminator"] = self._judge(real, picture.detach(), item, start, generator, last=last)
        if stage.matching and "critic" in self.learners:
            found["critic"] = self._follow(picture.detach(), item, start, generator)
        return found

    def _judge(
        self,
        real: torch.Tensor,
        fake: torch.Tensor,
        item: Item,
        start: Start,
        generator: torch.Generator,
        *,
        last: bool,
    ) -> torch.Tensor:
        discriminator = self.learners["discriminator"].module
        with self._synchronised(discriminator, last):
            loss = self.objective.telling(discriminator, real, fake, item, start, generator)
            self._backward(loss)
        return loss.detach()

    def _follow(self, picture: torch.Tensor, item: Item, start: Start, generator: torch.Generator) -> torch.Tensor:
        """The critic's own optimizer steps on the student's pictures; the last one's loss."""
        assert self.config.critic is not None
        critic, largest = self.learners["critic"], self.config.optimizer.clip
        error = torch.tensor(math.nan, device=picture.device)
        for _ in range(self.config.critic.updates):
            loss = self.objective.denoising(self.cast(critic.module), picture, item, start, generator)
            self.accelerator.backward(loss)
            # The norm is of all processes' gradients, so that all of them stop together.
            norm = torch.nn.utils.clip_grad_norm_(trainable(critic.plain).values(), largest or math.inf)
            error = loss.detach()
            if not (error.isfinite() & norm.isfinite()):
                return torch.full_like(error, math.nan)
            critic.optimizer.step()
            critic.optimizer.zero_grad()
        return error

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss / self.config.optimizer.accumulate)

    def _synchronised(self, module: Any, last: bool) -> Any:
        if self.sharded and module is self.student:
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(module)

    def step(self, stage: Stage) -> None:
        """Move the weights along their gradients, the student's clipped, and the running mean after them."""
        if self.config.optimizer.clip is not None:
            self.accelerator.clip_grad_norm_(trainable(self.student).values(), self.config.optimizer.clip)
        self.learners["student"].optimizer.step()
        if stage.adversarial:
            discriminator = self.learners["discriminator"]
            discriminator.optimizer.step()
            largest = GAMES[self.config.discriminator.loss].clip
            if largest is not None:
                clamp(discriminator.plain, largest)
        if self.mean is not None:
            self.mean.update(self.plain, batch=self.done)

    def forget(self) -> None:
        """Drop the gradients."""
        for learner in self.learners.values():
            learner.optimizer.zero_grad()

    def _set_rates(self) -> None:
        """The learning rates of the next batch: they rise, stand, and fall, each linearly."""
        warmup, decay = self.config.optimizer.warmup, self.config.optimizer.decay
        risen = (self.done + 1) / warmup if warmup else 1.0
        left = (self.config.batches - self.done) / decay if decay else 1.0
        share = min(1.0, risen, left)
        for learner in self.learners.values():
            learner.set_rate(share)

    def _reduced(self, sums: torch.Tensor) -> dict[str, float]:
        """The losses' mean over processes; what is not finite in one is not finite in all."""
        mean: Any = self.accelerator.reduce(sums, reduction="mean")
        return dict(zip(LOSSES, mean.tolist(), strict=True))

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything learnt, for a checkpoint. Every process has to call it."""
        found = {}
        for name, learner in self.learners.items():
            found[name] = weights_of(learner.plain)
            found[f"{name}-moments"] = moments_of(learner.plain, learner.optimizer)
        if self.mean is not None:
            found["mean"] = {name: whole(tensor) for name, tensor in self.mean.weights.items()}
        return found

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], *, done: int) -> None:
        """Go on from a checkpoint's tensors, after `done` batches."""
        for name, learner in self.learners.items():
            load_weights(learner.plain, tensors[name])
            load_moments(learner.plain, learner.optimizer, tensors[f"{name}-moments"])
        if self.mean is not None:
            self.mean.load(tensors["mean"])
        self.done = done
