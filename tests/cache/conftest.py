"""A pipeline with the cache on, and what the report says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vivace

STEPS = 12


@pytest.fixture
def last() -> Callable[[Any], dict[str, Any]]:
    """What the cache of a pipeline's only denoiser did at the last request."""

    def read(pipe: Any) -> dict[str, Any]:
        (found,) = vivace.report(pipe).cache.values()
        return found["last_request"]

    return read


@pytest.fixture(scope="session")
def _pipe() -> Any:
    from vivace.families import FAMILIES

    return FAMILIES["sd3"].tiny()


@pytest.fixture
def pipe(_pipe: Any) -> Iterator[Any]:
    """A tiny Stable Diffusion 3, whose outputs change smoothly from step to step; stock before and after."""
    stock = _pipe.scheduler
    yield _pipe
    vivace.restore(_pipe)
    vivace.restore(_pipe.transformer)  # a test may have accelerated it bare
    _pipe.scheduler = stock


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """The latents that a pipeline makes, always from the same noise."""

    def latents(pipe: Any, *, steps: int = STEPS, seed: int = 0, **arguments: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        arguments = {"prompt": "a fox", "guidance_scale": 4.0, "height": 64, "width": 64, **arguments}
        return pipe(num_inference_steps=steps, generator=generator, output_type="latent", **arguments).images

    return latents
