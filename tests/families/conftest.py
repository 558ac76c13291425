"""How to call any pipeline for a quick small picture, and how to see what its denoiser was given."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from vivace.family import family_of

SIDE = 64


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def quick() -> Callable[..., Any]:
    """Calls a pipeline for two steps at 64 x 64 pixels, with every argument that its `__call__` names."""
    picture = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    values = {
        "prompt": "a red circle",
        "image": picture,
        "mask_image": picture,
        "control_image": picture,
        "control_mask": picture,
        "width": SIDE,
        "height": SIDE,
        "video": [picture] * 5,
        "num_frames": 5,
        "num_inference_steps": 2,
        "strength": 0.9,
        "layers": 1,
        "max_sequence_length": 16,
        # without these some pipelines choose a size of their own
        "use_resolution_binning": False,
        "_auto_resize": False,
        "max_area": SIDE * SIDE,
        "output_type": "pt",
    }

    def call(pipe: Any, **kwargs: Any) -> Any:
        named = inspect.signature(pipe.__call__).parameters
        known = {name: value for name, value in values.items() if name in named}
        if "ControlNetUnion" in type(pipe).__name__:
            known["control_mode"] = [3]  # which of its kinds the control picture is
        return pipe(**known | {"generator": torch.Generator().manual_seed(0)} | kwargs)

    return call


@pytest.fixture(scope="session")
def seen(quick: Callable[..., Any]) -> Callable[..., tuple[Any, list[tuple[torch.nn.Module, dict[str, Any]]]]]:
    """Calls a pipeline as `quick` does; returns its output, and the denoiser and arguments of every denoiser call."""

    def call(pipe: Any, **kwargs: Any) -> tuple[Any, list[tuple[torch.nn.Module, dict[str, Any]]]]:
        calls = []
        denoisers = [getattr(pipe, name, None) for name in family_of(pipe).denoisers]

        def record(denoiser: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            named = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
            calls.append((denoiser, _copied(named)))

        hooks = [d.register_forward_pre_hook(record, with_kwargs=True) for d in denoisers if d is not None]
        try:
            return quick(pipe, **kwargs), calls
        finally:
            for hook in hooks:
                hook.remove()

    return call


@pytest.fixture(scope="session")
def assert_split_is_forward() -> Callable[..., None]:
    """Checks, bit for bit and in both output forms, that a family's Split computes what the denoiser's forward does."""

    def check(denoiser: torch.nn.Module, kwargs: dict[str, Any], *, family: Any) -> None:
        for return_dict in (False, True):
            given = {**kwargs, "return_dict": return_dict}
            expected = denoiser(**_copied(given))
            got = family.split(denoiser)(**_copied(given))
            assert type(got) is type(expected)
            wanted, found = _tensors(expected), _tensors(got)
            assert len(found) == len(wanted) > 0
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)

    return check


def _copied(value: Any) -> Any:
    """A copy through tensors, lists, tuples and dicts: some denoisers change the lists they are given."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, dict | list | tuple):
        return []  # such as a cache of keys and values beside the picture
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]
