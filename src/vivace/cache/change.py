"""How much a signal changed since another step: the number that decides whether a step is computed."""

from __future__ import annotations

import math

import torch

from vivace.kernels.change import change


def relative_change(signal: torch.Tensor, before: torch.Tensor) -> float:
    """The largest mean |signal - before| / mean |before| of any sample, for [B, ...]. One host read.

    Samples are judged apart, since guidance batches two prompts that move differently. A signal that was zero and is
    no more has changed infinitely, and so has one that is not a number.
    """
    return max(_ratio(difference, size) for difference, size in change(signal, before).tolist())


def _ratio(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    # NaN would compare as smaller than any threshold.
    return difference / size if size > 0 and math.isfinite(difference) else math.inf
