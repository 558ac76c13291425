"""Kernel distance between two sets of features (KID), unbiased, with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vivace.errors import InputError
from vivace.evals.features import checked


@dataclass(frozen=True, kw_only=True)
class Kid:
    """A kernel distance: near 0, also below it, for two samples of one distribution."""

    value: float
    standard_error: float
    subsets: int


def kid(generated: torch.Tensor, real: torch.Tensor, *, subset_size: int = 1000, seed: int = 0) -> Kid:
    """The squared MMD of features [N, D] and [M, D] under a cubic kernel (Bińkowski et al., arXiv 1801.01401).

    Both sets are shuffled and cut into disjoint subsets, and the unbiased estimates of the subsets averaged. Subsets
    that shared samples, as they are usually drawn, would be correlated and their scatter no measure of the error; these
    are independent, so the standard error is honest (block tests: Zaremba et al., arXiv 1307.1954).
    Raises InputError for features of different width, or too few samples for two subsets.
    """
    generated, real = checked(generated), checked(real)
    subsets = min(len(generated), len(real)) // subset_size
    if subset_size < 2 or subsets < 2:
        raise InputError(
            f"KID with subsets of {subset_size} needs subsets of 2 or more and twice as many samples a side, got "
            f"{len(generated)} and {len(real)}; take more pictures or a smaller subset_size"
        )
    generator = torch.Generator().manual_seed(seed)
    parts = [
        x[torch.randperm(len(x), generator=generator)[: subsets * subset_size].to(x.device)].split(subset_size)
        for x in (generated, real)
    ]
    values = torch.tensor([squared_mmd(x, y) for x, y in zip(*parts, strict=True)], dtype=torch.float64)
    return Kid(
        value=values.mean().item(),
        standard_error=values.std().item() / math.sqrt(subsets),
        subsets=subsets,
    )


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of [N, D] and [M, D], N and M >= 2.

    mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j), with
    k(a, b) = (a.b / D + 1)³. (Gretton et al., JMLR 13, 2012, equation 3.)
    """
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"both sides need the same features, got {x.shape[1]} and {y.shape[1]} wide; use one feature module"
        )
    return (_mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean()).item()


def _mean_of_pairs(x: torch.Tensor) -> torch.Tensor:
    products = _kernel(x, x)
    return (products.sum() - products.trace()) / (len(x) * (len(x) - 1))


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
