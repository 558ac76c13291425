"""The built-in model's world as training data: scenes drawn and described on the fly, never twice the same."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from vivace.builtin import captions, world
from vivace.builtin.render import render
from vivace.distill.data.sample import Batch


class World:
    """Endless batches of rendered scenes, without the combinations that are held out. Its state is one number."""

    def __init__(self, *, batch: int, seed: int, rank: int = 0, side: int = world.SIDE, device: str = "cpu") -> None:
        self.batch, self.seed, self.rank, self.side, self.device = batch, seed, rank, side, device
        self.number = 0

    def __next__(self) -> Batch:
        scenes, said = self.draw()
        return Batch(pixels=render(scenes, side=self.side) * 2 - 1, captions=said)

    def draw(self) -> tuple[world.Scenes, tuple[str, ...]]:
        """The next batch's scenes and captions, of which no picture is rendered."""
        rng = random.Random(f"{self.seed}/{self.rank}/{self.number}")
        self.number += 1
        generator = torch.Generator(self.device).manual_seed(rng.getrandbits(63))
        parts: list[world.Scenes] = []
        while sum(map(len, parts)) < self.batch:
            scenes = world.sample(self.batch + 32, generator)
            parts.append(scenes[(~world.holds_out(scenes)).nonzero()[:, 0]])
        scenes = world.concatenate(parts)[slice(self.batch)]
        return scenes, tuple(captions.say(row, rng)[0] for row in captions.facts(scenes))

    def state(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"number": self.number}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.number = state["number"]
