"""A training sample: a picture and its caption, read with suspicion; and a batch of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from vivace.distill.config import Data

PICTURES = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


class Place(NamedTuple):
    """Where a sample is."""

    shard: str
    name: str


class Refused(Exception):
    """A sample that is left out; says why in a few words, the same ones for the same reason."""

    def __init__(self, reason: str, *, broken: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.broken = broken  # or only not wanted


@dataclass(frozen=True)
class Sample:
    """One picture and what is said of it."""

    picture: Image.Image
    caption: str
    extras: Mapping[str, Image.Image] = field(default_factory=dict)  # further pictures by member name: "control"


@dataclass(frozen=True)
class Batch:
    """Pictures of one size."""

    pixels: torch.Tensor  # [B, 3, H, W] float32 in [-1, 1]
    captions: tuple[str, ...]
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)  # [B, 3, H, W] in [-1, 1]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[3], self.pixels.shape[2]


def parse(members: Mapping[str, bytes], data: Data, *, needs: Iterable[str] = ()) -> Sample:
    """The sample that a shard's members (`jpg`, `json`, `txt`, `control.png`, ...) make up.

    `needs` are the further pictures that it has to have. Members of any other kind are never looked at, so nothing in
    a shard is unpickled. Raises Refused.
    """
    about = _about(members)
    caption = next((about[key] for key in data.captions if isinstance(about.get(key), str)), None)
    if caption is None and "txt" in members:
        caption = members["txt"].decode("utf-8", errors="replace")
    if caption is None or not caption.strip():
        raise Refused("no caption", broken=True)
    if data.least_score is not None:
        score = about.get(data.score)
        if not isinstance(score, int | float) or not score >= data.least_score:
            raise Refused(f"{data.score} below {data.least_score:g} or missing", broken=False)
    pictures = {name: raw for name, raw in members.items() if name.rpartition(".")[2] in PICTURES}
    main = next((name for name in pictures if "." not in name), None)
    if main is None:
        raise Refused("no picture", broken=True)
    picture = _picture(pictures.pop(main))
    if min(picture.size) < data.least_side:
        raise Refused(f"a side below {data.least_side} pixels", broken=False)
    extras = {name.rpartition(".")[0]: _picture(raw) for name, raw in pictures.items()}
    if missing := next((name for name in needs if name not in extras), None):
        raise Refused(f"no picture {missing}", broken=True)
    return Sample(picture=picture, caption=caption.strip(), extras=extras)


def _about(members: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        about = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise Refused("JSON that cannot be read", broken=True) from error
    return about if isinstance(about, dict) else {}


def _picture(raw: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(raw), formats=tuple(set(PICTURES.values()))) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    # Pillow's decoders raise nearly anything on a broken file.
    except Exception as error:
        raise Refused("a picture that cannot be read", broken=True) from error


def bucket(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Which of `sizes` has the aspect ratio nearest to a picture's."""
    ratio = np.log(size[0] / size[1])
    return min(sizes, key=lambda one: abs(np.log(one[0] / one[1]) - ratio))


def bucket_sizes(size: tuple[int, int], ratios: Sequence[float], *, multiple: int) -> list[tuple[int, int]]:
    """A width and height for every aspect ratio, with the area of `size`, in multiples that the VAE can make."""
    area = size[0] * size[1]
    found = []
    for ratio in ratios:
        width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        found.append((max(1, round(width / multiple)) * multiple, max(1, round(height / multiple)) * multiple))
    return list(dict.fromkeys(found))


def fitted(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """The picture scaled to cover `size` and cut at its centre: [3, H, W] in [-1, 1]."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    scaled = picture.resize(
        (max(size[0], round(picture.width * scale)), max(size[1], round(picture.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (scaled.width - size[0]) // 2, (scaled.height - size[1]) // 2
    cut = np.asarray(scaled.crop((left, top, left + size[0], top + size[1])), dtype=np.float32)
    return torch.from_numpy(cut.transpose(2, 0, 1) / 127.5 - 1)


def collate(samples: Sequence[Sample], size: tuple[int, int]) -> Batch:
    """Samples as one batch of `size`; extras that not every sample has, and so none needs, are left out."""
    shared = set(samples[0].extras).intersection(*(sample.extras for sample in samples))
    return Batch(
        pixels=torch.stack([fitted(sample.picture, size) for sample in samples]),
        captions=tuple(sample.caption for sample in samples),
        extras={
            name: torch.stack([fitted(sample.extras[name], size) for sample in samples]) for name in sorted(shared)
        },
    )
