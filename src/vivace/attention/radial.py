"""Sparse attention for video, after Radial Attention (arXiv 2506.19852): what is far in time is seen through a narrower
window of space. Not exact.

A query sees all of the few frames around its own (its chunk), its own band of space in every frame, and the whole
first frame, which videos keep looking back to. Each of these key sets is a dense attention over equal groups of tokens,
so it runs at the full speed of the dense kernel; only the bands need their tokens brought together. The sets overlap,
and every key must count once: the numerators and denominators of softmax add up, so those of the overlaps are
subtracted (inclusion and exclusion, on log-sum-exps). Chunks and bands move by half their size from layer to layer,
which lets sight cross their borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vivace.attention.backend import Backend
from vivace.attention.native import NATIVE, attend_lse
from vivace.attention.space_time import SPACE_TIME
from vivace.kernels.merge_heads import merge_heads
from vivace.request import LAYER

CHUNK = 3
"""Latent frames that see each other whole."""

BANDS = 6
"""Bands of a frame, about: as many as divide its tokens evenly."""

DENSE_LAYERS = 1
"""The first layers of a stack look everywhere."""

DENSE_SHARE = 0.25
"""Of a request's steps, the first ones, which look everywhere: they lay out what moves where."""

LEAST_SAVED = 0.4
"""Below this share of query-key pairs left out, gathering the bands and merging costs what it saves."""


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees. Tokens are numbered frame by frame; groups are `(first frame, chunks, frames each)`."""

    frames: int
    tokens: int  # of one frame
    bands: int
    shifted: bool

    @property
    def chunks(self) -> tuple[tuple[int, int, int], ...]:
        """The chunks in time as groups of equal ones: a shorter one may come first and last."""
        first = CHUNK // 2 if self.shifted else 0
        whole, rest = divmod(self.frames - first, CHUNK)
        groups = (0, 1, first), (first, whole, CHUNK), (self.frames - rest, 1, rest)
        return tuple(group for group in groups if group[1] and group[2])

    @property
    def band(self) -> int:
        """Tokens of one band of one frame."""
        return self.tokens // self.bands

    @property
    def share(self) -> float:
        """Query-key pairs computed, overlaps included, of all of them."""
        near = sum(count * size**2 for _, count, size in self.chunks) / self.frames**2
        return (near + 1 / self.frames) * (1 + 1 / self.bands) + 1 / self.bands

    def by_band(self, device: torch.device) -> torch.Tensor:
        """[S] the token at every place once they are ordered by band, then frame."""
        return _by_band(self, device)


@lru_cache(maxsize=16)
def _by_band(pattern: Pattern, device: torch.device) -> torch.Tensor:
    numbers = torch.arange(pattern.frames * pattern.tokens, device=device).view(pattern.frames, pattern.tokens)
    moved = numbers.roll(-(pattern.band // 2), 1) if pattern.shifted else numbers
    return moved.view(pattern.frames, pattern.bands, pattern.band).transpose(0, 1).flatten()


@lru_cache(maxsize=16)
def _by_frame(pattern: Pattern, device: torch.device) -> torch.Tensor:
    return pattern.by_band(device).argsort().int()


@lru_cache(maxsize=16)
def pattern_of(*, frames: int, tokens: int, layer: int) -> Pattern | None:
    """The pattern of one layer, or None where it would leave too little out."""
    bands = max((n for n in range(1, 2 * BANDS) if tokens % n == 0), key=lambda n: -abs(n - BANDS))
    pattern = Pattern(frames, tokens, bands, shifted=layer % 2 == 1)
    return pattern if pattern.share < 1 - LEAST_SAVED else None


def attend_pattern(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, pattern: Pattern, scale: float | None = None
) -> torch.Tensor:
    """Attention of q, k, v `[B, S, H, D]`, S tokens frame by frame, over the keys that `pattern` lets a query see."""
    size, first = pattern.tokens, pattern.chunks[0][2]
    index = pattern.by_band(q.device)
    banded = [x[:, index].unflatten(1, (pattern.bands, -1)).flatten(0, 1) for x in (q, k, v)]  # [B bands, F band, H, D]

    near = _grouped(q, k, v, groups=pattern.chunks, size=size, scale=scale)
    bands = attend_lse(*banded, scale=scale)
    near_in_bands = _grouped(*banded, groups=pattern.chunks, size=pattern.band, scale=scale)
    sink = attend_lse(q, k[:, :size], v[:, :size], scale=scale)
    sink_in_bands = attend_lse(banded[0], *(x[:, : pattern.band] for x in banded[1:]), scale=scale)
    # The first chunk has the first frame among its own.
    sink[1][:, : first * size] = -torch.inf
    sink_in_bands[1][:, : first * pattern.band] = -torch.inf

    parts = (near, bands, near_in_bands, sink, sink_in_bands)
    return merge_heads(
        [out.reshape(q.shape) for out, _ in parts],
        [lse.reshape(q.shape[:3]) for _, lse in parts],
        signs=(1, 1, -1, 1, -1),
        permuted=(False, True, True, False, True),
        places=_by_frame(pattern, q.device),
    )


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, groups: tuple[tuple[int, int, int], ...], size: int, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within groups of frames of `size` tokens: `[B, S, H, D]`, and its log-sum-exp `[B, S, H]`."""
    batch, made = q.shape[0], []
    for first, count, frames in groups:
        tokens = slice(first * size, (first + count * frames) * size)
        out = attend_lse(*(x[:, tokens].unflatten(1, (count, -1)).flatten(0, 1) for x in (q, k, v)), scale=scale)
        made.append([part.unflatten(0, (batch, count)).flatten(1, 2) for part in out])
    outs, lses = zip(*made, strict=True)
    return (outs[0], lses[0]) if len(made) == 1 else (torch.cat(outs, 1), torch.cat(lses, 1))


def _attend(q, k, v, *, mask=None, scale=None):
    here = SPACE_TIME.get()
    if here is None or mask is not None or not q.shape[1] == k.shape[1] == here.frames * here.tokens:
        return NATIVE.attend(q, k, v, mask=mask, scale=scale)
    layer = int((LAYER.get() or "0").rpartition(".")[2])
    pattern = pattern_of(frames=here.frames, tokens=here.tokens, layer=layer)
    if layer < DENSE_LAYERS or pattern is None:
        return NATIVE.attend(q, k, v, scale=scale)
    return attend_pattern(q, k, v, pattern=pattern, scale=scale)


RADIAL = Backend(
    name="radial",
    attend=_attend,
    devices=frozenset({"cuda", "cpu"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    exact=False,
    dense_share=DENSE_SHARE,
    leaves="the first quarter of the steps, the first layer, cross-attention and videos of few frames native's",
    masks=True,
    asks_where=True,
)
