"""Previews: a linear map from latents to colours, learned from the first finished pictures of a model.

A latent position's colour is nearly linear in its channels, so least squares over a few pictures gives a map that costs
nothing, knows no VAE, and works for packed latents too: it only sees a grid of positions. One picture may hold two
colours only; each of the next ones adds its own.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image

SIDE = 256  # pixels of a preview's longer side
PICTURES = 16  # that are learned from
RIDGE = 1e-3  # share of a channel's mean square that keeps what no picture has shown near zero


class Sketch:
    """Draws latents of one model; knows nothing before it has learned from one picture."""

    def __init__(self) -> None:
        self._map: torch.Tensor | None = None  # [C + 1, 3]
        self._squares = self._products = torch.zeros(())  # of the features: [C + 1, C + 1], and with colours [C + 1, 3]
        self._pictures = 0
        self._lock = threading.Lock()

    @property
    def learned(self) -> bool:
        return self._map is not None

    def learn(self, latents: torch.Tensor, picture: Image.Image) -> None:
        """Take the final latents of a picture and the picture; after `PICTURES` they are ignored."""
        if self._pictures >= PICTURES:
            return
        grid = _grid(latents, picture.width / picture.height)
        if grid is None:
            return
        colours = torch.frombuffer(
            bytearray(picture.convert("RGB").resize((grid.shape[2], grid.shape[1])).tobytes()), dtype=torch.uint8
        )
        seen = _features(grid)
        with self._lock:
            if self._map is not None and self._map.shape[0] != seen.shape[1]:
                return
            self._squares = self._squares + seen.T @ seen
            self._products = self._products + seen.T @ colours.view(-1, 3).float()
            self._pictures += 1
            ridge = RIDGE * self._squares.diagonal().mean() * torch.eye(len(self._squares))
            self._map = torch.linalg.solve(self._squares + ridge, self._products)

    def draw(self, latents: torch.Tensor, *, size: tuple[int, int]) -> Image.Image | None:
        """A small picture of the shape of `size` (width, height); None before it has learned, or for other latents."""
        from PIL import Image

        grid = _grid(latents, size[0] / size[1])
        if self._map is None or grid is None or grid.shape[0] + 1 != self._map.shape[0]:
            return None
        colours = (_features(grid) @ self._map).clamp(0, 255).to(torch.uint8).numpy()
        small = Image.frombytes("RGB", (grid.shape[2], grid.shape[1]), colours.tobytes())
        scale = min(1.0, SIDE / max(size))
        return small.resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), Image.Resampling.BICUBIC)


def _grid(latents: torch.Tensor, aspect: float) -> torch.Tensor | None:
    """The first picture's latents (of a video: its middle frame's) as [C, H, W] on the CPU; None for other shapes."""
    x = latents[0].detach().float().cpu()
    if x.ndim == 4:  # [C, F, H, W]
        x = x[:, x.shape[1] // 2]
    if x.ndim == 2:  # packed: [S, C], row by row
        rows = max(1, round(math.sqrt(x.shape[0] / aspect)))
        if x.shape[0] % rows:
            return None
        x = x.T.unflatten(1, (rows, -1))
    return x if x.ndim == 3 else None


def _features(grid: torch.Tensor) -> torch.Tensor:
    flat = grid.flatten(1).T  # [S, C]
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
