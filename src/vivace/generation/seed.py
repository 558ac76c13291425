"""One seed for all that a picture draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vivace.generation.job import SEEDS

if TYPE_CHECKING:
    import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for a pipeline on `device`; inside, what it draws without its generator comes of `seed` too.

    On the CPU, so that a seed means the same noise on every device. Stable Diffusion 3's ControlNets, for one, draw
    their control image's latents from torch's own generator, which is as before afterwards.
    """
    import torch

    devices = [device] if device.type == "cuda" else []
    other = SEEDS - 1 - seed  # not the generator's own numbers once more
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(other)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(other)
        yield torch.Generator("cpu").manual_seed(seed)
