"""LPIPS (arXiv 1801.03924): the distance of VGG16's features, with weights from a file of yours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vivace import checkpoint
from vivace.errors import InputError

LAYERS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1], channel by channel
CROP = 64  # latents a side that are decoded


class Lpips(nn.Module):
    """VGG16's five depths, and how much each of their channels counts."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = nn.ModuleList()
        before = 3
        for widths in LAYERS:
            convolutions = []
            for width in widths:
                convolutions += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.depths.append(nn.Sequential(*convolutions))
        self.counts = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in LAYERS)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The mean distance of pictures [B, 3, H, W] in [-1, 1]."""
        mean, spread = (a.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, SPREAD))
        a, b = (a - mean) / spread, (b - mean) / spread
        total = a.new_zeros(())
        for index, (depth, count) in enumerate(zip(self.depths, self.counts, strict=True)):
            if index:
                a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
            a, b = depth(a), depth(b)
            apart = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()
            total = total + count(apart).mean()
        return total


def load_lpips(path: Path) -> Lpips:
    """LPIPS with the weights in a safetensors file: torchvision's VGG16 names (`features.0.weight`, ...) for the
    convolutions, and `lin0.model.1.weight` to `lin4.model.1.weight`. Raises InputError for another file.
    """
    from safetensors.torch import load_file

    found = checkpoint.header(path)
    model = Lpips()
    names = dict(zip((name for name, _ in model.named_parameters()), _file_names(), strict=True))
    for own, name in names.items():
        if name not in found or found[name].shape != tuple(model.get_parameter(own).shape):
            raise InputError(f"{path} has no {name} of the right shape; lpips_weights takes VGG16 and LPIPS' layers")
    weights = load_file(path)
    model.load_state_dict({own: weights[name].float() for own, name in names.items()})
    return model.eval().requires_grad_(False)


def _file_names() -> list[str]:
    names, place = [], 0
    for widths in LAYERS:
        for _ in widths:
            names += [f"features.{place}.weight", f"features.{place}.bias"]
            place += 2
        place += 1  # pooling
    return names + [f"lin{index}.model.1.weight" for index in range(len(LAYERS))]


def decoded_distance(vae: Any, path: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS of the decoded centres of two latents."""
    lpips = load_lpips(path).to(vae.device)

    def decoded(z: torch.Tensor) -> torch.Tensor:
        top, left = (max(0, side - CROP) // 2 for side in z.shape[2:])
        z = z[:, :, top : top + CROP, left : left + CROP] / vae.config.scaling_factor
        z = z + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)

    def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            goal = decoded(teacher)
        return lpips(decoded(student), goal)

    return distance
