"""The modulation of all steps of a request in one product, made in its first.

Modulation depends on the prompt and on the time alone, and a request's scheduler tells its times beforehand. A step's
own costs as much as reading all the weights that make it, for a single row: 6.5 GB of FLUX.1's 24, 13.6 of
Qwen-Image's 41. So many rows at once cost hardly more than one.

A step finds its row by its time, on the device. A time that nobody foresaw is no error: its row is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vivace.fused.elementwise import TORCH
from vivace.fused.modulation import Modulation
from vivace.fused.parts import Parts
from vivace.kernels.few_rows_linear import MOST

LARGEST = 2**28
"""Bytes that the modulation of one prompt's steps may take: 50 steps of Qwen-Image take 222 MB."""


class Made(NamedTuple):
    """A step's modulation as it was made before: `rows` [B, times, W], and for which of them that is so, [B]."""

    rows: torch.Tensor
    found: torch.Tensor


@dataclass(frozen=True)
class Foreseen:
    """The modulation of every step, `rows` [S, B, times, W], and the times [S] as the denoiser is given them."""

    times: torch.Tensor
    rows: torch.Tensor
    samples: torch.Tensor  # 0, 1, ..., B - 1

    def at(self, time: torch.Tensor) -> Made | None:
        """That of a call whose samples are at `time` [B]; None where it has none for so many."""
        if time.shape != self.rows.shape[1:2]:
            return None
        found, step = (self.times == time[:, None]).to(torch.uint8).max(dim=1)
        return Made(self.rows[step, self.samples], found.view(torch.bool))


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """Makes it for one denoiser.

    `embed(times [N], once, kwargs)` is the activated embedding [N, D], or [N, times, D], of N times, the samples of
    each step side by side; None where a call brings what changes from step to step. `unit` is what pipelines divide a
    scheduler's timesteps by, in the type of the latents.
    """

    modulation: Modulation
    embed: Callable[[torch.Tensor, Mapping[str, Any], Mapping[str, Any]], torch.Tensor | None]
    unit: float

    def __call__(self, timesteps: torch.Tensor, once: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Foreseen | None:
        """For a scheduler's `timesteps` [S] and the request's first call; None where it would gain nothing."""
        time, latents = kwargs["timestep"], kwargs["hidden_states"]
        rows = len(latents) * self.modulation.times
        size = len(timesteps) * rows * self.modulation.columns * latents.element_size()
        several = len(timesteps) > 1 and time.shape == (len(latents),)
        if not several or rows > MOST or size > LARGEST or not self.modulation.stack.bare:
            return None
        times = timesteps.to(time.device, time.dtype) / self.unit
        embedding = self.embed(times.repeat_interleave(len(latents)), once, kwargs)
        if embedding is None:
            return None
        made = self.modulation.table(embedding).view(len(times), len(latents), self.modulation.times, -1)
        return Foreseen(times, made, torch.arange(len(latents), device=time.device))

    def like(self, latents: torch.Tensor) -> Made:
        """What a call with `latents` [B, ...] would find, whatever the values."""
        rows = latents.new_empty(len(latents), self.modulation.times, self.modulation.columns)
        return Made(rows, latents.new_empty(len(latents), dtype=torch.bool))


def foresight_of(parts: Parts, **fields: Any) -> Foresight | None:
    """One where kernels compute: torch's operations would read the weights in any case."""
    return None if parts.elementwise is TORCH else Foresight(**fields)
