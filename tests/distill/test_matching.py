"""Distribution matching where everything is known: a teacher of two values, and a student of four steps."""

import copy

import pytest
import torch
from torch import nn

from vivace.distill.losses import matching, velocity_distance

LEVELS = (1.0, 0.9, 0.75, 0.5)  # of a four-step sampler
WIDTH = 0.1  # standard deviation around either value


def teacher(x, sigma):
    """The mean of what x = (1 - sigma) picture + sigma noise may show: pictures near 1 and -1, each as often."""
    alpha = 1 - sigma
    variance = alpha**2 * WIDTH**2 + sigma**2
    values = torch.stack((torch.ones_like(x), -torch.ones_like(x)))
    odds = (-((x - alpha * values) ** 2) / (2 * variance)).softmax(0)
    return (odds * (values + alpha * WIDTH**2 / variance * (x - alpha * values))).sum(0)


class Denoiser(nn.Module):
    """Sees a picture [B, 1, 1, 1] in x [B, 1, 1, 1] at sigma [B, 1, 1, 1], by way of a velocity."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, sigma):
        return x - sigma * self.layers(torch.cat((x, sigma), 3))


def drawn(student, *, steps, count):
    """Where the sampler stands before its step `steps`, and the level there."""
    x = torch.randn(count, 1, 1, 1)
    for step in range(steps):
        picture = student(x, torch.full_like(x, LEVELS[step]))
        x = (1 - LEVELS[step + 1]) * picture + LEVELS[step + 1] * torch.randn_like(x)
    return x, torch.full_like(x, LEVELS[steps])


def veiled(picture):
    sigma = torch.rand_like(picture)
    return (1 - sigma) * picture + sigma * torch.randn_like(picture), sigma


@pytest.fixture(scope="module")
def beginner():
    """A network that sees what the teacher sees."""
    torch.manual_seed(0)
    made = Denoiser()
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    for _ in range(600):
        picture = (2.0 * torch.randint(2, (512, 1, 1, 1)) - 1) + WIDTH * torch.randn(512, 1, 1, 1)
        x, sigma = veiled(picture)
        optimizer.zero_grad()
        velocity_distance(made(x, sigma), teacher(x, sigma), sigma.flatten()).backward()
        optimizer.step()
    return made


def trained(beginner, *, batches):
    """The pictures of a student that learnt by matching alone."""
    torch.manual_seed(1)
    student, critic = copy.deepcopy(beginner), copy.deepcopy(beginner)
    optimizer, follower = (torch.optim.Adam(net.parameters(), lr) for net, lr in ((student, 1e-3), (critic, 2e-3)))
    for batch in range(batches):
        with torch.no_grad():
            x, level = drawn(student, steps=batch % 4, count=512)
        picture = student(x, level)
        with torch.no_grad():
            x, sigma = veiled(picture)
            real, fake = teacher(x, sigma), critic(x, sigma)
        optimizer.zero_grad()
        matching(picture, real, fake).backward()
        optimizer.step()
        for _ in range(2):
            x, sigma = veiled(picture.detach())
            follower.zero_grad()
            velocity_distance(critic(x, sigma), picture.detach(), sigma.flatten()).backward()
            follower.step()
    with torch.no_grad():
        return student(*drawn(student, steps=3, count=8000)).flatten()


def between(found):
    """The share of pictures between the two values: the teacher draws none."""
    return float((found.abs() < 0.6).float().mean())


def test_matching_with_a_critic_leads_to_what_the_teacher_draws(beginner):
    """Both values, each about as often; the student itself in the critic's place mostly diverges here."""
    before, after = (trained(beginner, batches=batches) for batches in (0, 800))
    assert between(after) < 0.7 * between(before)
    assert 0.25 < float((after > 0).float().mean()) < 0.75
