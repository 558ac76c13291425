"""Fréchet distance between two sets of features (FID), from streamed means and covariances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vivace.errors import InputError
from vivace.evals.features import checked


@dataclass
class Moments:
    """Count, mean and scatter of feature vectors, gathered batch by batch.

    Batches, and the parts several processes gathered, are joined by the pairwise update of Chan, Golub and LeVeque
    (1983), which loses no digits however far the features lie from zero.
    """

    count: int
    mean: torch.Tensor  # [D] float64
    scatter: torch.Tensor  # [D, D] float64: sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: torch.Tensor) -> Moments:
        """The moments of one batch [N, D], N >= 1. Raises InputError for features that are not finite."""
        features = checked(features)
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(count=len(features), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def stream(cls, batches: Iterable[torch.Tensor]) -> Moments:
        """The moments of all `batches` of [N, D], holding one at a time. Raises InputError when there is none."""
        total = None
        for features in batches:
            part = cls.of(features)
            total = part if total is None else total + part
        if total is None:
            raise InputError("there are no features to take moments of; give at least one batch")
        return total

    def __add__(self, other: Moments) -> Moments:
        _same_width(self, other)
        count = self.count + other.count
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(
            count=count,
            mean=self.mean + shift * (other.count / count),
            scatter=self.scatter + other.scatter + between,
        )

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance, [D, D] float64."""
        return self.scatter / (self.count - 1)


def fid(generated: Moments, real: Moments) -> float:
    """The Fréchet distance of two Gaussians fitted to the features (Heusel et al., arXiv 1706.08500).

        ||m1 - m2||² + tr C1 + tr C2 - 2 tr (C1^½ C2 C1^½)^½

    The last trace is the sum of the singular values of C1^½ C2^½. Taken so, with symmetric roots by `eigh`, it has
    float64's full precision even for singular covariances, and the distance of a set from itself is 0 to rounding.
    The estimate is biased upwards by the number of samples: compare only values of equal counts, and beside the value
    between two sets of real pictures.
    Raises InputError for features of different width, or fewer than D + 1 samples on either side.
    """
    width = _same_width(generated, real)
    for name, moments in (("generated", generated), ("real", real)):
        if moments.count <= width:
            raise InputError(
                f"FID in {width} features needs more than {width} samples a side, got {moments.count} {name} ones; "
                "take more pictures, narrower features, or KID"
            )
    means = (generated.mean - real.mean).square().sum()
    traces = generated.covariance.trace() + real.covariance.trace()
    roots = symmetric_root(generated.covariance) @ symmetric_root(real.covariance)
    # Rounding may leave a distance of zero a hair below it.
    return max(0.0, (means + traces - 2 * torch.linalg.svdvals(roots).sum()).item())


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite [D, D] matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    # Eigenvalues of 0 come out as rounding errors of either sign, whose roots would be 1e8 times larger errors.
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def _same_width(first: Moments, second: Moments) -> int:
    if len(first.mean) != len(second.mean):
        raise InputError(
            f"both sides need the same features, got {len(first.mean)} and {len(second.mean)} wide; "
            "use one feature module"
        )
    return len(first.mean)
