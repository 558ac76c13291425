"""Tiny pipelines behind an engine."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vivace.families import FAMILIES
from vivace.family import Family
from vivace.inputs import arguments
from vivace.serve import Engine, Request

SIDE = 64
PICTURE = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
PROMPTS = ("a red circle", "a blue ring left of a star", "a red circle")
SMALL = {"max_sequence_length": 16, "use_resolution_binning": False, "_auto_resize": False, "max_area": SIDE * SIDE}


class Gate:
    """A door in front of a real module's calls: while it is shut they wait; `failing` is raised in their stead."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()  # a call is at the door
        self.failing: BaseException | None = None
        self.failures = 0  # how many calls fail; the rest go through
        self.sizes: list[int] = []
        module.register_forward_pre_hook(self._pass, with_kwargs=True)

    def shut(self) -> None:
        self.reached.clear()
        self.open.clear()

    def fail(self, error: BaseException, *, times: int = 1) -> None:
        self.failing, self.failures = error, times

    def _pass(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self.sizes.append(first.shape[0])
        self.reached.set()
        assert self.open.wait(120)
        if self.failures and self.failing is not None:
            self.failures -= 1
            raise self.failing


@pytest.fixture(scope="session")
def order() -> Callable[..., Request]:
    """Makes a small quick request."""
    return lambda **fields: Request(**{"prompt": "a red circle", "size": (SIDE, SIDE), "steps": 3, "seed": 1, **fields})


@pytest.fixture(scope="session")
def requests() -> Callable[..., list[Request]]:
    """Makes three requests for a pipeline of a family, of different seeds, prompts and steps."""

    def make(family: Family, pipe: Any, **fields: Any) -> list[Request]:
        accepted = arguments(type(pipe))
        extra: dict[str, Any] = {name: value for name, value in SMALL.items() if name in accepted}
        if "video" in accepted:
            extra["video"] = [PICTURE] * 5
        if "image" in accepted and accepted["image"].default is inspect.Parameter.empty:
            fields["images"] = (PICTURE,)
        if family.media == "video":
            fields["frames"] = 5
        fields |= {"size": (SIDE, SIDE), "arguments": extra}
        prompts = PROMPTS if "prompt" in family.takes else ("",) * len(PROMPTS)
        return [
            Request(**{**fields, "prompt": prompt, "steps": steps, "seed": steps})
            for steps, prompt in enumerate(prompts, start=2)
        ]

    return make


@pytest.fixture(scope="session")
def pixels() -> Callable[[Image.Image], np.ndarray]:
    """A picture as whole numbers that can be subtracted."""
    return lambda picture: np.asarray(picture).astype(int)


@pytest.fixture(scope="session")
def gated() -> type[Gate]:
    return Gate


@pytest.fixture
def pipe() -> Any:
    """A tiny random pipeline of the built-in model's family, the test's own."""
    return FAMILIES["sd3"].tiny()


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Starts engines, and closes them when the test ends."""
    with ExitStack() as stack:
        yield lambda pipe, **options: stack.enter_context(Engine(models={"tiny": pipe}, **options))


@pytest.fixture
def engine(pipe: Any, start: Callable[..., Engine]) -> Engine:
    return start(pipe)
