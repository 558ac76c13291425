"""Noise levels: a noisy latent is x = alpha z + sigma n, whatever the model predicts.

Sigma, in float64 and from 0 (the picture) to about 1 (noise), names the level everywhere in this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import torch

from vivace.errors import InputError


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 over a table of timesteps: Stable Diffusion, SDXL, PixArt."""

    table: torch.Tensor  # [T] sigma of every timestep, rising

    def grid(self, steps: int, *, tokens: int = 0) -> torch.Tensor:
        """The levels of `steps` solver steps, from noise down and the 0 at the end, [steps + 1]; trailing spacing."""
        total = len(self.table)
        times = torch.arange(total, 0, -total / steps, dtype=torch.float64).round().long()[:steps] - 1
        return torch.cat((self.table[times], self.table.new_zeros(1)))

    def at(self, time: float, *, tokens: int = 0) -> float:
        """The level of a time between 0 and 1000."""
        return self.table[min(len(self.table) - 1, int(time * len(self.table) / 1000))].item()

    def alpha(self, sigma: torch.Tensor) -> torch.Tensor:
        """What is left of the picture at `sigma`."""
        return (1 - sigma**2).clamp(min=0).sqrt()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timestep that the denoiser is told."""
        table = self.table.to(sigma.device)
        upper = torch.searchsorted(table, sigma.contiguous()).clamp(1, len(table) - 1)
        lower_is_nearer = (sigma - table[upper - 1]) < (table[upper] - sigma)
        return (upper - lower_is_nearer.long()).float()


@dataclass(frozen=True)
class Straight:
    """alpha = 1 - sigma, the straight path of flow matching: Stable Diffusion 3, FLUX."""

    shift: float = 1.0
    dynamic: tuple[float, float, float, float] | None = None  # tokens and shift, at two picture sizes
    exponential: bool = True  # how a dynamic shift is applied

    def shifted(self, sigma: torch.Tensor, tokens: int) -> torch.Tensor:
        """The level that stands at `sigma` of the unshifted path, for a picture of so many tokens."""
        factor = self.shift
        if self.dynamic is not None:
            low, high, least, most = self.dynamic
            mu = least + (most - least) * (tokens - low) / (high - low)
            factor = exp(mu) if self.exponential else mu
        return factor * sigma / (1 + (factor - 1) * sigma)

    def grid(self, steps: int, *, tokens: int = 0) -> torch.Tensor:
        """The levels of `steps` solver steps, from noise down and the 0 at the end: [steps + 1]."""
        return self.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), tokens)

    def at(self, time: float, *, tokens: int = 0) -> float:
        """The level of a time between 0 and 1000."""
        return self.shifted(torch.tensor(time / 1000, dtype=torch.float64), tokens).item()

    def alpha(self, sigma: torch.Tensor) -> torch.Tensor:
        """What is left of the picture at `sigma`."""
        return 1 - sigma

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timestep that the denoiser is told."""
        return (1000 * sigma).float()


Levels = VariancePreserving | Straight

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


def levels_of(scheduler: Any) -> tuple[str, Levels]:
    """What a pipeline's denoiser predicts ("epsilon", "v", "sample" or "flow"), and its noise levels.

    Both are read from the scheduler it came with. Raises InputError for a noise schedule of another kind.
    """
    config: Mapping[str, Any] = scheduler.config
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return "flow", _straight(config)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"a {name} has neither a flow's nor a variance preserving schedule; distil with another one")
    table = (1 - scheduler.alphas_cumprod.double().cpu()).sqrt()
    prediction = PREDICTIONS[config.get("prediction_type", "epsilon")]
    if prediction == "epsilon" and table[-1] >= 1 - 1e-7:
        raise InputError("a model that predicts noise cannot start at a terminal SNR of zero; use its own scheduler")
    return prediction, VariancePreserving(table)


def _straight(config: Mapping[str, Any]) -> Straight:
    if not config.get("use_dynamic_shifting"):
        shift = config.get("shift")
        return Straight(shift=config.get("flow_shift", 1.0) if shift is None else shift)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    low, high, least, most = (config[name] for name in names)
    return Straight(dynamic=(low, high, least, most), exponential=config.get("time_shift_type") != "linear")
