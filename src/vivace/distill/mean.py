"""The running mean of a student's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vivace.distill.student import trainable
from vivace.distill.weights import like


class Mean:
    """An exponential running mean of a module's trainable weights, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().float().clone() for name, parameter in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, batch: int) -> None:
        """Take in the weights after batch number `batch` (from 0); early on the mean follows faster."""
        decay = min(self.decay, (1 + batch) / (10 + batch))
        now = trainable(module)
        # In a few launches for all of them.
        torch._foreach_lerp_(list(self.weights.values()), [now[name].float() for name in self.weights], 1 - decay)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the mean."""
        for name, tensor in self.weights.items():
            tensor.copy_(like(weights[name], tensor))

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """`module` has the mean as its weights for the length of a `with` block."""
        own = {name: parameter.detach().clone() for name, parameter in trainable(module).items()}
        _copy(self.weights, module)
        try:
            yield
        finally:
            _copy(own, module)


@torch.no_grad()
def _copy(weights: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    for name, parameter in trainable(module).items():
        parameter.copy_(weights[name])
