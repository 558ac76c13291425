"""How much a signal changed since another step: the scalar that decides whether a step is computed."""

from __future__ import annotations

import torch


def relative_change(signal: torch.Tensor, before: torch.Tensor) -> float:
    """The largest mean |signal - before| / mean |before| of any sample, for [B, ...]. Waits for the device once.

    Samples are judged apart, since guidance batches two prompts that move differently. A signal that was zero and is
    no more has changed infinitely.
    """
    difference, size = (t.flatten(1).mean(1) for t in ((signal.float() - before.float()).abs(), before.float().abs()))
    change = torch.where(difference == 0, 0.0, difference / size)
    # NaN would compare as smaller than any threshold.
    return change.nan_to_num(nan=torch.inf).max().item()
