"""What few bits cost, layer by layer: the relative error of every linear's output on the inputs it really gets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vivace.quant import format_of
from vivace.quant.layers import Layer, condensed_name
from vivace.quant.linear import QuantLinear


def layer_errors(
    denoiser: torch.nn.Module, arguments: Mapping[str, Any], *, layers: Sequence[Layer]
) -> dict[str, float]:
    """Name -> |quantised(x) - linear(x)| / |linear(x)| of those `layers` that were chosen, in one call of `denoiser`.

    `arguments` are the call's. Every layer sees what it sees in 16 bit, so errors do not add up from layer to layer,
    and only one layer at a time exists twice. The denoiser is left as it was.
    """
    found: dict[str, torch.Tensor] = {}

    def measuring(layer: Layer):
        def hook(linear: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            assert layer.format
            quantised = QuantLinear.of(linear, format=format_of(layer.format), how=layer.how or "rowwise")
            difference = quantised(inputs[0]).float() - output.float()
            error = difference.norm() / output.float().norm().clamp_min(1e-12)
            # A layer that is called several times counts with its worst.
            found[layer.name] = torch.maximum(found[layer.name], error) if layer.name in found else error

        return hook

    chosen = [layer for layer in layers if layer.format]
    hooks = [denoiser.get_submodule(layer.name).register_forward_hook(measuring(layer)) for layer in chosen]
    try:
        with torch.no_grad():
            denoiser(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: error.item() for name, error in found.items()}


def by_kind(errors: Mapping[str, float]) -> dict[str, float]:
    """The worst error of each kind of layer: of names that differ only in the numbers of their blocks."""
    kinds: dict[str, float] = defaultdict(float)
    for name, error in errors.items():
        kinds[condensed_name(name)] = max(kinds[condensed_name(name)], error)
    return dict(kinds)
