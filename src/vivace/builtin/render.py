"""Scenes to pictures: signed distance functions in torch, anti-aliased over one pixel, no host reads."""

from __future__ import annotations

import math

import torch

from vivace.builtin.world import COLOURS, SHAPES, SIDE, SLOTS, Scenes

STROKE = 0.24  # width of an outline, of the radius
SHADE = 0.72  # a pattern's second colour
TINT = 8.0 / 255.0  # colours vary by this much


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to every shape of radius 1 at points x, y (y down), stacked in the order of SHAPES: [8, ...]."""
    ax, ay, r = x.abs(), y.abs(), (x * x + y * y + 1e-12).sqrt()
    return torch.stack(
        (
            r - 1,
            torch.maximum(ax, ay) - 0.82,
            torch.maximum(y - 0.8, (1.8 * ax - y - 1) / 2.059),
            (ax + ay - 1.08) * 0.7071,
            star(x, y, r),
            heart(ax * 0.62, 0.52 - y * 0.62) / 0.62,
            torch.minimum(torch.maximum(ax - 0.96, ay - 0.38), torch.maximum(ax - 0.38, ay - 0.96)),
            (r - 0.72).abs() - 0.28,
        )
    )


def star(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor, inner: float = 0.52) -> torch.Tensor:
    """Five points: fold the plane into one tenth, then the distance to the edge from tip to notch."""
    sector = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    tip, notch = 1.08, (1.08 * inner * math.cos(sector / 2), 1.08 * inner * math.sin(sector / 2))
    edge = (notch[0] - tip, notch[1])
    length = math.hypot(*edge)
    return (r * torch.sin(angle) * -edge[0] + (r * torch.cos(angle) - tip) * edge[1]) / length


def heart(ax: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A square standing on its corner under two half discs; ax = |x|, y up, the tip at the origin."""
    lobe = ((ax - 0.25).square() + (y - 0.75).square() + 1e-12).sqrt() - math.sqrt(2) / 4
    along = 0.5 * (ax + y).clamp(min=0)
    near = torch.minimum(ax.square() + (y - 1).square(), (ax - along).square() + (y - along).square())
    return torch.where(ax + y > 1, lobe, (near + 1e-12).sqrt() * torch.sign(ax - y))


def render(scenes: Scenes, *, side: int = SIDE) -> torch.Tensor:
    """Pictures [B, 3, side, side], float in [0, 1]."""
    device = scenes.count.device
    line = (torch.arange(side, device=device) + 0.5) * (SIDE / side)
    x, y = line[None, None, :], line[None, :, None]
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255.0
    picture = background(scenes, palette, x, y)
    here = scenes.present()
    for slot in range(SLOTS):
        radius = scenes.radius[:, slot, None, None]
        d = distances(
            ((x - scenes.centre[:, slot, 0, None, None]) / radius).expand(-1, side, -1),
            ((y - scenes.centre[:, slot, 1, None, None]) / radius).expand(-1, -1, side),
        )
        mine = torch.arange(len(SHAPES), device=device)[:, None] == scenes.shape[:, slot]
        d = (d * mine[..., None, None]).sum(0)
        d = torch.where(scenes.outlined[:, slot, None, None], torch.maximum(d, -d - STROKE), d)
        cover = (0.5 - d * radius * (side / SIDE)).clamp(0, 1) * here[:, slot, None, None]
        colour = (palette[scenes.colour[:, slot]] + TINT * scenes.tint[:, slot]).clamp(0, 1)
        picture = torch.lerp(picture, colour[:, :, None, None], cover[:, None])
    return picture


def background(scenes: Scenes, palette: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The ground: one colour, blended towards its darker shade (black's: lighter) as the pattern says."""
    orientation, period, phase = (scenes.pattern[:, i, None, None] for i in range(3))
    kind = scenes.background[:, None, None]
    slant = (orientation * 3).floor()  # across, down, diagonal
    along = torch.where(slant == 0, x + 0 * y, torch.where(slant == 1, y + 0 * x, (x + y) * 0.7071))
    wave = 28 + 20 * period  # pixels of one light and one dark band
    gradient = torch.where(orientation < 0.5, along / SIDE, 1 - along / SIDE).clamp(0, 1) * 1.3
    stripes = band(along + phase * wave, wave)
    cells = 2 * wave
    a, b = band(x + phase * cells, cells), band(y + phase * cells, cells)
    checks = a + b - 2 * a * b
    blend = torch.where(kind == 1, gradient, torch.where(kind == 2, stripes, checks)) * (kind > 0)
    light = (palette[scenes.ground] + TINT * scenes.tint[:, 3]).clamp(0, 1)
    dark = torch.where(light.amax(1, keepdim=True) < 0.2, light + 0.2, light * SHADE)
    return torch.lerp(light[:, :, None, None], dark[:, :, None, None], blend[:, None])


def band(t: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """A square wave in [0, 1] of this period in pixels, its edges one pixel soft."""
    distance = (torch.remainder(t, period) - period / 2).abs() - period / 4
    return (0.5 - distance).clamp(0, 1)
