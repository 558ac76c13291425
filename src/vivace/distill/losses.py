"""The losses: how far the student is from the teacher, and from looking real."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l2": lambda student, teacher: (student - teacher).square().mean(),
    "l1": lambda student, teacher: (student - teacher).abs().mean(),
    # pseudo-Huber with the width that LCM uses (arXiv 2310.04378)
    "huber": lambda student, teacher: ((student - teacher).square() + 1e-6).sqrt().sub(1e-3).mean(),
}
"""Mean distances of two latents."""


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The distance of two feature maps [B, C, H, W], each position's channels at unit length.

    With the frozen teacher's features it is perceptual as LPIPS is (arXiv 1801.03924), in latent space.
    """
    apart = F.normalize(student.float(), dim=1) - F.normalize(teacher.float(), dim=1)
    return apart.square().sum(1).mean()


def velocity_distance(seen: torch.Tensor, picture: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """How far a denoiser's pictures [B, C, H, W] are off, as the mean square of its velocity's error.

    For flow models x = picture + sigma (noise - picture), so a velocity is wrong by (seen - picture) / sigma; the v of
    variance preserving models (arXiv 2202.00512) is wrong by as much. Levels [B] below 0.02 count as that.
    """
    scale = sigma.clamp(min=0.02).to(seen.device, seen.dtype).view(-1, 1, 1, 1)
    return ((seen - picture) / scale).square().mean()


def matching(student: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Distribution matching (arXiv 2311.18828): moves `student` [B, C, H, W] along real - fake.

    `real` and `fake` are what the guided teacher and the critic see in the noised student's picture. Each sample's
    step is divided by its mean |student - real|; the gradient is 2 w (fake - real) / size, and reaches only `student`.
    """
    with torch.no_grad():
        weight = 1 / ((student - real).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-5)
        goal = student - weight * (fake - real)
    return (student - goal).square().mean()


class Game(NamedTuple):
    """One adversarial objective on logits [B, ...]."""

    generator: Callable[[torch.Tensor], torch.Tensor]  # of the fakes
    discriminator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of real ones and fakes
    clip: float | None = None  # largest weight of the discriminator


def _vanilla(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy: real is 1, fake 0."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


GAMES: dict[str, Game] = {
    # arXiv 1705.02894
    "hinge": Game(lambda fake: -fake.mean(), lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
    # arXiv 1611.04076, of probabilities as in Flash Diffusion: bounded, so that no weight of it runs away
    "least_squares": Game(
        lambda fake: (fake.sigmoid() - 1).square().mean(),
        lambda real, fake: ((real.sigmoid() - 1).square().mean() + fake.sigmoid().square().mean()) / 2,
    ),
    # arXiv 1406.2661: its practical and its original generator
    "non_saturating": Game(lambda fake: F.softplus(-fake).mean(), _vanilla),
    "vanilla": Game(lambda fake: -F.softplus(fake).mean(), _vanilla),
    # arXiv 1701.07875
    "wasserstein": Game(lambda fake: -fake.mean(), lambda real, fake: fake.mean() - real.mean(), clip=0.01),
}
"""Adversarial objectives by name."""
