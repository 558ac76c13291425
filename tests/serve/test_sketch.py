"""Previews: what is learned from finished pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vivace.serve import sketch
from vivace.serve.sketch import Sketch

COLOURS = torch.tensor([[200.0, 30, 40], [20, 180, 60], [30, 60, 220], [120, 120, 20]])  # of four channels


def made(*channels: int) -> tuple[torch.Tensor, Image.Image]:
    """Latents in stripes, each of one channel, and the picture that they stand for."""
    latents = torch.zeros(1, 4, 8, 8)
    for row in range(8):
        latents[0, channels[row % len(channels)], row] = 1
    colours = torch.einsum("chw,cr->hwr", latents[0], COLOURS).to(torch.uint8).numpy()
    return latents, Image.fromarray(np.ascontiguousarray(colours))


def error(learner: Sketch, *channels: int) -> float:
    latents, picture = made(*channels)
    drawn = learner.draw(latents, size=(8, 8))
    assert drawn is not None
    return float(abs(np.asarray(drawn).astype(int) - np.asarray(picture).astype(int)).mean())


def test_nothing_is_known_at_first():
    assert Sketch().draw(made(0, 1)[0], size=(8, 8)) is None


def test_each_picture_adds_its_colours():
    learner = Sketch()
    learner.learn(*made(0, 1))
    assert error(learner, 0, 1) < 2
    before = error(learner, 2, 3)
    assert before > 20
    learner.learn(*made(2, 3))
    assert error(learner, 2, 3) < 2
    assert error(learner, 0, 1) < 2


def test_enough_is_enough(monkeypatch):
    monkeypatch.setattr(sketch, "PICTURES", 1)
    learner = Sketch()
    learner.learn(*made(0, 1))
    learner.learn(*made(2, 3))
    assert error(learner, 2, 3) > 20


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4)])
def test_other_latents_are_left_alone(shape):
    learner = Sketch()
    learner.learn(*made(0, 1))
    learner.learn(torch.zeros(shape), made(0)[1])
    assert error(learner, 0, 1) < 2
    assert learner.draw(torch.zeros(shape), size=(8, 8)) is None
