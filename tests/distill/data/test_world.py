"""The built-in model's world as data."""

import pytest
import torch

from vivace.distill.data import supply_of
from vivace.distill.data.world import World
from vivace.errors import InputError


def test_batches_are_rendered_described_and_resumable():
    world = World(batch=3, seed=1, side=32)
    first, second = next(world), next(world)
    assert first.pixels.shape == (3, 3, 32, 32)
    assert float(first.pixels.min()) >= -1
    assert float(first.pixels.max()) <= 1
    assert not torch.equal(first.pixels, second.pixels)
    assert all(caption.strip() for caption in first.captions)
    again = World(batch=3, seed=1, side=32)
    again.load({"number": 1})
    third = next(again)
    assert torch.equal(third.pixels, second.pixels)
    assert third.captions == second.captions
    assert again.state() == world.state() == {"number": 2}


def test_processes_and_seeds_draw_their_own():
    drawn = [next(World(batch=2, seed=seed, rank=rank, side=32)).captions for seed in (0, 1) for rank in (0, 1)]
    assert len(set(drawn)) == 4


def test_a_size_that_is_no_square_is_refused(config):
    with pytest.raises(InputError, match=r"size is \[64, 32\]; data of kind builtin are squares"):
        supply_of(config(size=(64, 32)), multiple=16)
