"""A network in training: as it is called, as it is kept, and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vivace.distill.config import Optimizer
from vivace.distill.student import trainable

BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Learner:
    """A network with trained weights, and their AdamW."""

    module: Any  # for calls with a gradient: several processes wrap it
    plain: nn.Module  # without the wrapping
    optimizer: torch.optim.AdamW
    lr: float  # the highest

    def set_rate(self, share: float) -> None:
        """The learning rate of the next step, as a share of the highest."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.lr


def make_learner(
    module: nn.Module, accelerator: Accelerator, *, lr: float, config: Optimizer, wrapped: bool = True
) -> Learner:
    """`module` on the accelerator's device, with an optimizer of its trainable weights."""
    module = module.to(accelerator.device)
    weights = list(trainable(module).values())
    # One launch for many weights, and their counts on the device. Shards are left to torch's own choice.
    fused = all(type(one) is nn.Parameter and one.is_cuda for one in weights) or None
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=BETAS, weight_decay=config.weight_decay, fused=fused)
    return Learner(accelerator.prepare(module) if wrapped else module, module, optimizer, lr)
