"""What a backend that is not exact costs: the relative error of every attention layer on the q, k and v it gets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from vivace.attention.backend import Backend
from vivace.attention.native import NATIVE
from vivace.attention.route import Route


def attention_errors(denoiser: torch.nn.Module, arguments: Mapping[str, Any], *, backend: Backend) -> dict[str, float]:
    """Name -> |backend - native| / |native| of every attention module in one stock call of `denoiser`.

    Every module sees what it sees in 16 bit, so errors do not add up; one that attends several times counts with its
    worst. Calls that the backend leaves to native count as 0.
    """
    found: dict[str, torch.Tensor] = {}
    inside: list[str] = []

    def attend(q, k, v, *, mask=None, scale=None):
        exact = NATIVE.attend(q, k, v, mask=mask, scale=scale)
        difference = backend.attend(q, k, v, mask=mask, scale=scale).float() - exact.float()
        error = difference.norm() / exact.float().norm().clamp_min(1e-12)
        found[inside[-1]] = torch.maximum(found[inside[-1]], error) if inside[-1] in found else error
        return exact

    def enter(name: str, *call: Any) -> None:
        inside.append(name)

    modules = [(name, module) for name, module in denoiser.named_modules() if hasattr(module, "processor")]
    hooks = [module.register_forward_pre_hook(partial(enter, name)) for name, module in modules]
    hooks += [module.register_forward_hook(lambda *call: inside.pop() and None) for _, module in modules]
    try:
        with torch.no_grad(), Route(backend, attend=attend):
            denoiser(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: error.item() for name, error in found.items()}
