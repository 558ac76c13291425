"""Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982): orthogonalised momentum, for the matrices of blocks."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

SHARE = 2.0  # of the learning rate that AdamW takes
QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the reference implementation


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are updated as one batch: a step costs a few launches a shape, not dozens a matrix.

    The update's root mean square is 0.2, AdamW's usual one, so that both can follow one learning rate.
    """

    def __init__(self, matrices: list[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.01):
        shapes = defaultdict(list)
        for matrix in matrices:
            shapes[matrix.shape].append(matrix)
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "share": SHARE, "capturable": True}
        super().__init__([{"params": same} for same in shapes.values()], defaults)
        for group in self.param_groups:
            group["lr"] = torch.zeros((), device=group["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update; the gradients are used up."""
        for group in self.param_groups:
            live = group["params"]
            for matrix in live:
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            moving, grads = [self.state[matrix]["momentum"] for matrix in live], [matrix.grad for matrix in live]
            torch._foreach_lerp_(moving, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, moving, group["momentum"])  # Nesterov's
            rows, columns = live[0].shape
            update = orthogonal(torch.stack(grads)) * (0.2 * max(rows, columns) ** 0.5)
            torch._foreach_mul_(live, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(live, list((update.to(live[0].dtype) * group["lr"]).unbind()))


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearly orthogonal factor of each matrix [N, R, C]: singular values near one, by Newton-Schulz in bfloat16."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
