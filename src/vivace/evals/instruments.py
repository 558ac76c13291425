"""What pictures are measured with beyond PSNR and SSIM: trained networks, and folders of real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vivace.errors import InputError
from vivace.evals.features import extract
from vivace.evals.fid import Moments, fid
from vivace.evals.kid import kid
from vivace.evals.metric import Metric
from vivace.generation import picture

Paired = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Pictures and reference [F, 3, H, W] in [0, 1] -> one value a frame."""

Captioned = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
"""Pictures [F, 3, H, W] in [0, 1] and their captions -> one value a frame."""

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

FEWEST = 4
"""Pictures on either side: two subsets of two."""

SUBSET = 1000
"""Pictures in one of KID's subsets, where there are so many."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Real pictures, by their features: how far a set of pictures is from them."""

    module: Callable[[torch.Tensor], torch.Tensor]  # pictures [B, 3, H, W] -> features [B, D]
    features: torch.Tensor  # [N, D] of the real ones
    distances: tuple[str, ...] = ("FID", "KID")

    @classmethod
    def of(
        cls,
        folder: Path,
        module: Callable[[torch.Tensor], torch.Tensor],
        *,
        distances: tuple[str, ...] = ("FID", "KID"),
        drawn: int | None = None,
    ) -> Dataset:
        """The pictures in `folder`, each at its own size. Raises InputError where there are none.

        With `drawn`, the number of pictures to come, it also raises where these or the real ones are too few for FID.
        """
        found = torch.cat(list(extract(module, _pictures(folder))))
        width = found.shape[1]
        fewest = min(len(found), len(found) if drawn is None else drawn)
        if fewest < FEWEST:
            raise InputError(
                f"a distance of sets needs {FEWEST} pictures a side, got {drawn} prompts; give more of them"
            )
        if "FID" in distances and fewest <= width:
            raise InputError(
                f"FID in {width} features needs more than {width} pictures a side, got {len(found)} in {folder}"
                f"{'' if drawn is None else f' and {drawn} prompts'}; give more of them, or --kid {folder} alone"
            )
        return cls(module=module, features=found, distances=distances)

    def measure(self, pictures: Iterable[torch.Tensor], *, of: str) -> list[Metric]:
        """How far `pictures`, batches [B, 3, H, W], are from the real ones."""
        drawn = torch.cat(list(extract(self.module, pictures)))
        rows = []
        if "FID" in self.distances:
            value = fid(Moments.of(drawn), Moments.of(self.features))
            rows.append(Metric(name="FID", of=of, value=value, count=len(drawn)))
        if "KID" in self.distances:
            size = min(SUBSET, min(len(drawn), len(self.features)) // 2)
            found = kid(drawn, self.features, subset_size=size)
            error = 1.96 * found.standard_error
            low, high = found.value - error, found.value + error
            rows.append(Metric(name="KID", of=of, value=found.value, low=low, high=high, count=len(drawn)))
        return rows


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """Further instruments of a comparison, by what they need to see."""

    paired: Mapping[str, Paired] = field(default_factory=dict)
    captioned: Mapping[str, Captioned] = field(default_factory=dict)
    dataset: Dataset | None = None


def _pictures(folder: Path) -> Iterator[torch.Tensor]:
    """Every picture of a folder, [1, 3, H, W] in [0, 1]."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with pictures ({', '.join(sorted(PICTURES))})")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if len(paths) < FEWEST:
        raise InputError(f"{folder} holds {len(paths)} pictures, and a distance of sets needs {FEWEST}; give more")
    for path in paths:
        pixels = np.asarray(picture.read(path))
        yield torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
