"""One batch of Flash Diffusion (arXiv 2406.02347): where it starts, what the teacher makes of it, and its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from vivace.config import resolve
from vivace.distill.call import Call
from vivace.distill.config import DistillConfig, Stage
from vivace.distill.features import Features
from vivace.distill.losses import DISTANCES, GAMES, feature_distance, matching, velocity_distance
from vivace.distill.solver import rollout, solver_of
from vivace.distill.stages import mixture, steps_before
from vivace.distill.view import View, with_guidance
from vivace.request import keeping

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Item:
    """Latents and what the denoiser is told of them."""

    z: torch.Tensor  # [B, C, H, W] float32
    call: Call


@dataclass(frozen=True)
class Start:
    """Where a batch starts on the teacher's grid."""

    x: torch.Tensor  # [B, C, H, W] the noisy latents
    grid: torch.Tensor  # [n + 1] float64, from the start's level down to 0
    guidance: float
    ends: tuple[float, float] = (math.inf, -math.inf)
    """Levels from which, and down from which, the teacher's attention is in 16 bit: `exact_ends` of its preset."""

    def sigma(self) -> torch.Tensor:
        """The level, once a sample: [B] float64."""
        return self.grid[0].expand(len(self.x))


@dataclass(frozen=True)
class Objective:
    """The losses of a student beside a frozen teacher. All randomness comes from the generators handed in."""

    config: DistillConfig
    view: View
    teacher: nn.Module
    features: Features
    tokens: Callable[[torch.Tensor], int]  # how many tokens a transformer makes of such latents
    perceptual: Distance | None = None  # LPIPS of decoded latents

    def start(
        self,
        item: Item,
        stage: Stage,
        student: Callable[..., Any],
        generator: torch.Generator,
        *,
        choices: torch.Generator | None = None,
    ) -> Start:
        """Draw a level from the stage's mixture, a guidance and noise, each once for the batch.

        `choices`, where given, draws all but the noise: what decides how often teacher and student are called.
        """
        z = item.z
        choices = choices or generator
        index = self.place(stage, choices)
        low, high = stage.guidance
        guidance = low + (high - low) * _share(choices)
        levels = self.view.levels.grid(stage.steps, tokens=self.tokens(z))
        before = steps_before(stage, index)
        if stage.simulated and before and _share(choices) < stage.simulated:
            places = levels[[*before, index, -1]]
            x = self.simulated(item, places, guidance, student, generator)
            return Start(x, levels[index:], guidance, self.ends(levels))
        noise = self.noise(z, generator)
        # A sampler starts from noise alone, also where the noisiest level keeps a trace of the picture.
        x = noise if index == 0 else self.view.noisy(z, noise, levels[index].expand(len(z)))
        return Start(x, levels[index:], guidance, self.ends(levels))

    def place(self, stage: Stage, choices: torch.Generator) -> int:
        """Draw an index of the teacher's grid from the stage's mixture: the first that `choices` decides of a batch."""
        odds = mixture(stage, kind=self.config.timesteps)
        return int(torch.multinomial(odds.to(choices.device), 1, generator=choices))

    @property
    def exact_ends(self) -> int:
        """The first and last steps of the teacher's whose attention is in 16 bit, where its preset has fewer."""
        return 0 if self.config.accelerate is None else resolve(self.config.accelerate).exact_ends

    def ends(self, levels: torch.Tensor) -> tuple[float, float]:
        """Of a grid, [K + 1] float64, the level of the last of the first steps, and of the first of the last ones."""
        count, steps = self.exact_ends, len(levels) - 1
        if not count:
            return Start.ends
        return float(levels[min(count, steps) - 1]), float(levels[max(steps - count, 0)])

    @torch.no_grad()
    def simulated(
        self,
        item: Item,
        levels: torch.Tensor,  # [n + 2] float64: of n steps of the few-step sampler, where they lead, and 0
        guidance: float,
        student: Callable[..., Any],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The student's own noisy latents where its sampler comes to `levels[-2]`: [B, C, H, W].

        They have the mistakes of its first steps, which noisy data never shows and which its later steps have to mend
        (backward simulation: arXiv 2405.14867, section 4.5).
        """
        x = self.noise(item.z, generator)
        for place in range(len(levels) - 2):
            picture = self.predict(student, Start(x, levels[place:], guidance), item)
            x = self.view.noisy(picture, self.noise(x, generator), levels[place + 1].expand(len(x)))
        return x

    @staticmethod
    def noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Gaussian noise in the shape of `like`."""
        return torch.randn(like.shape, generator=generator, device=like.device)

    @torch.no_grad()
    def target(self, item: Item, start: Start, student: Callable[..., Any]) -> torch.Tensor:
        """What the student is to predict from `start`: [B, C, H, W].

        With `flash` the end of the teacher's guided solver; with `consistency` the student's own prediction one solver
        step further on.
        """
        one_step = self.config.method == "consistency"

        def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            highest, lowest = start.ends
            with keeping(not lowest < float(sigma[0]) < highest):
                return self.view.guided(self.teacher, x, sigma, item.call, guidance=start.guidance)

        grid = start.grid[:2] if one_step else start.grid
        solver = "euler" if one_step else solver_of(self.config.solver, self.view.levels)
        end = rollout(start.x, grid, denoised, levels=self.view.levels, solver=solver)
        if not one_step or grid[-1] == 0:
            return end
        return self.predict(student, Start(end, start.grid[1:], start.guidance), item)

    def predict(self, student: Callable[..., Any], start: Start, item: Item) -> torch.Tensor:
        """The student's picture from `start` in one evaluation: [B, C, H, W]."""
        picture = self.view.denoised(student, start.x, start.sigma(), self.told(item, start.guidance))
        return self.view.boundary(start.x, picture, start.sigma())

    def told(self, item: Item, guidance: float) -> Call:
        """What the student hears: the guided half, and the guidance where the model embeds it."""
        return with_guidance(item.call.guided_half(), guidance)

    def distance(self, student: torch.Tensor, teacher: torch.Tensor, item: Item, start: Start) -> torch.Tensor:
        """The distillation loss."""
        kind = self.config.distance
        if kind == "features":
            levels = self.levels_at([10.0] * len(student), student)
            seen = [self.seen(picture, levels, self.told(item, start.guidance)) for picture in (student, teacher)]
            return feature_distance(seen[0], seen[1].detach())
        if kind == "lpips":
            assert self.perceptual is not None
            return self.perceptual(student, teacher)
        return DISTANCES[kind](student, teacher)

    def matching(
        self, picture: torch.Tensor, item: Item, stage: Stage, critic: Callable[..., Any], generator: torch.Generator
    ) -> torch.Tensor:
        """The distribution matching loss; `critic` denoises the student's pictures."""
        with torch.no_grad():
            low, high = stage.guidance
            guidance = low + (high - low) * _share(generator)
            x, sigma = self.veiled(picture, generator)
            # Beside a `fake` in 16 bit: where the preset has steps whose attention is exact, this is one.
            with keeping(self.exact_ends > 0):
                real = self.view.guided(self.teacher, x, sigma, item.call, guidance=guidance)
            fake = self.view.denoised(critic, x, sigma, self.told(item, guidance))
        return matching(picture, real, fake)

    def denoising(
        self, critic: Callable[..., Any], picture: torch.Tensor, item: Item, start: Start, generator: torch.Generator
    ) -> torch.Tensor:
        """The critic's loss on the student's pictures [B, C, H, W]; no gradient reaches the student."""
        x, sigma = self.veiled(picture, generator)
        seen = self.view.denoised(critic, x, sigma, self.told(item, start.guidance))
        return velocity_distance(seen, picture.detach(), sigma)

    def veiled(self, picture: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures under noise of any level, and the levels [B]."""
        times = 1000 * torch.rand(len(picture), generator=generator, device=picture.device)
        sigma = self.levels_at(times.tolist(), picture)
        return self.view.noisy(picture.detach(), self.noise(picture, generator), sigma), sigma

    def fooling(
        self, discriminator: nn.Module, picture: torch.Tensor, item: Item, start: Start, generator: torch.Generator
    ) -> torch.Tensor:
        """The student's adversarial loss; no gradient reaches the discriminator."""
        sigma, noise = self.disguise(picture, generator)
        seen = self.seen(self.view.noisy(picture, noise, sigma), sigma, self.told(item, start.guidance))
        frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
        return GAMES[self.config.discriminator.loss].generator(functional_call(discriminator, frozen, (seen,)))

    def telling(
        self,
        discriminator: Callable[..., torch.Tensor],
        real: torch.Tensor,
        fake: torch.Tensor,
        item: Item,
        start: Start,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The discriminator's loss on real and fake latents under the same noise; no gradient reaches the student."""
        sigma, noise = self.disguise(fake, generator)
        with torch.no_grad():
            call = self.told(item, start.guidance)
            seen = [self.seen(self.view.noisy(one, noise, sigma), sigma, call) for one in (real, fake)]
        logits = discriminator(torch.cat(seen))
        return GAMES[self.config.discriminator.loss].discriminator(*logits.chunk(2))

    def disguise(self, like: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [B] out of the discriminator's times, and noise."""
        times = self.config.discriminator.times
        chosen = torch.randint(len(times), (len(like),), generator=generator, device=like.device)
        return self.levels_at([times[index] for index in chosen.tolist()], like), self.noise(like, generator)

    def levels_at(self, times: Sequence[float], z: torch.Tensor) -> torch.Tensor:
        """The levels of times between 0 and 1000: [B] float64."""
        tokens = self.tokens(z)
        return torch.tensor([self.view.levels.at(time, tokens=tokens) for time in times], dtype=torch.float64)

    def seen(self, x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
        """The teacher's features of x at `sigma`: [B, C, h, w]."""
        found = self.features(sides=(x.shape[2], x.shape[3]), **self.view.arguments(x, sigma, call))
        return found.float()


def _share(generator: torch.Generator) -> float:
    """A number from 0 to 1."""
    return float(torch.rand((), generator=generator, device=generator.device))
