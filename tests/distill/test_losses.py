"""Every loss against values worked out by hand."""

import math

import pytest
import torch

from vivace.distill.losses import DISTANCES, GAMES, feature_distance, matching, velocity_distance


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# name -> the generator's loss of the fakes (-1, 2), the discriminator's of the real ones (0.5, 3) and those fakes
BY_HAND = {
    "hinge": (-(-1 + 2) / 2, (0.5 + 0) / 2 + (0 + 3) / 2),
    "least_squares": (
        ((sigmoid(-1) - 1) ** 2 + (sigmoid(2) - 1) ** 2) / 2,
        (((sigmoid(0.5) - 1) ** 2 + (sigmoid(3) - 1) ** 2) / 2 + (sigmoid(-1) ** 2 + sigmoid(2) ** 2) / 2) / 2,
    ),
    "non_saturating": (
        (softplus(1) + softplus(-2)) / 2,
        ((softplus(-0.5) + softplus(-3)) / 2 + (softplus(-1) + softplus(2)) / 2) / 2,
    ),
    "vanilla": (
        -(softplus(-1) + softplus(2)) / 2,
        ((softplus(-0.5) + softplus(-3)) / 2 + (softplus(-1) + softplus(2)) / 2) / 2,
    ),
    "wasserstein": (-(-1 + 2) / 2, (-1 + 2) / 2 - (0.5 + 3) / 2),
}


@pytest.mark.parametrize("name", GAMES)
def test_games(name):
    generator, discriminator = BY_HAND[name]
    fake, real = logits(-1.0, 2.0), logits(0.5, 3.0)
    assert float(GAMES[name].generator(fake)) == pytest.approx(generator, rel=1e-6)
    assert float(GAMES[name].discriminator(real, fake)) == pytest.approx(discriminator, rel=1e-6)


@pytest.mark.parametrize("name", GAMES)
def test_games_pull_apart_what_the_generator_pulls_together(name):
    fake, real = logits(0.1).requires_grad_(), logits(0.2).requires_grad_()
    GAMES[name].discriminator(real, fake).backward()
    assert fake.grad is not None
    assert real.grad is not None
    assert float(real.grad) < 0 < float(fake.grad)  # a step down raises the real one and lowers the fake
    fake.grad = None
    GAMES[name].generator(fake).backward()
    assert float(fake.grad) < 0


def test_distances():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert float(DISTANCES["l2"](a, b)) == pytest.approx((4 + 1) / 2)
    assert float(DISTANCES["l1"](a, b)) == pytest.approx((2 + 1) / 2)
    huber = (math.sqrt(4 + 1e-6) - 1e-3 + math.sqrt(1 + 1e-6) - 1e-3) / 2
    assert float(DISTANCES["huber"](a, b)) == pytest.approx(huber, rel=1e-6)
    assert all(float(distance(a, a)) == pytest.approx(0, abs=1e-7) for distance in DISTANCES.values())


def test_feature_distance_looks_at_directions_only():
    a = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    b = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    assert float(feature_distance(a, b)) == pytest.approx((0.6 - 0.8) ** 2 + (0.8 - 0.6) ** 2, rel=1e-5)
    assert float(feature_distance(a, 7 * a)) == pytest.approx(0, abs=1e-10)


def test_velocity_distance_is_that_of_the_velocity():
    noise, picture, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    level = sigma.view(-1, 1, 1, 1)
    guess = torch.randn(2, 3, 4, 4)
    # A flow model's picture is x - sigma velocity, and the right velocity noise - picture.
    x = (1 - level) * picture + level * noise
    wanted = (guess - (noise - picture)).square().mean()
    assert float(velocity_distance(x - level * guess, picture, sigma)) == pytest.approx(float(wanted), rel=1e-4)
    # v = alpha noise - sigma picture, and the picture is alpha x - sigma v (arXiv 2202.00512).
    alpha = (1 - level**2).sqrt()
    x = alpha * picture + level * noise
    wanted = (guess - (alpha * noise - level * picture)).square().mean()
    assert float(velocity_distance(alpha * x - level * guess, picture, sigma)) == pytest.approx(float(wanted), rel=1e-4)
    assert float(velocity_distance(picture + 0.02, picture, torch.zeros(2))) == pytest.approx(1, rel=1e-4)


def test_matching_by_hand():
    student = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2).requires_grad_()
    real = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
    fake = torch.tensor([1.5, 1.0]).view(1, 1, 1, 2)
    weight = 1 / ((1 + 2) / 2 + 1e-5)
    loss = matching(student, real, fake)
    step = [weight * -0.5, weight * -3.0]
    assert float(loss) == pytest.approx((step[0] ** 2 + step[1] ** 2) / 2, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    # 2 / N times the step towards real, and nothing through the weight
    assert student.grad.flatten().tolist() == pytest.approx(step, rel=1e-5)
    assert real.grad is None


def test_matching_weighs_every_sample_by_itself():
    student, real, fake = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 10.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    both = matching(student, real, fake)
    # (fake - real) / |student - real| is 1 for either, however far it is
    assert float(both) == pytest.approx(1, rel=1e-4)
