"""The reader: a small network, trained apart from the generator, that reads a picture back into its objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from vivace.builtin.world import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES

GRID = 16  # cells a side; a cell is 16 pixels
PRESENT, DOUBT = 0.5, 0.3  # a peak above PRESENT is an object, one between the two makes the reading doubtful
CERTAIN = 0.5  # an attribute less probable than this makes the reading doubtful
HEADS = {"peak": 1, "offset": 2, "shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "outlined": 2}
WHOLE = {"background": len(BACKGROUNDS), "ground": len(COLOURS), "shapes": len(SHAPES), "colours": len(COLOURS)}
FEATURES = 64
WEIGHTS = Path(__file__).parent / "reader.safetensors"


class Residual(nn.Module):
    """Two 3x3 convolutions with group norms around a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Reader(nn.Module):
    """Pictures [B, 3, 256, 256] in [0, 1] to object cells on a 16 x 16 grid and a description of the whole."""

    def __init__(self, widths: tuple[int, int, int, int] = (32, 48, 80, 112)):
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(nn.Conv2d(3, a, 5, 2, 2), nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 3, 2, 1))
        self.fine = nn.Sequential(Residual(b), Residual(b))
        self.middle = nn.Sequential(nn.Conv2d(b, c, 3, 2, 1), Residual(c), Residual(c))
        self.coarse = nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), Residual(d), Residual(d))
        self.cells = nn.Sequential(nn.GroupNorm(8, d), nn.SiLU(), nn.Conv2d(d, sum(HEADS.values()), 1))
        self.feature = nn.Linear(2 * d, FEATURES)
        self.whole = nn.Linear(FEATURES, sum(WHOLE.values()))

    def trunk(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Feature maps at a quarter, an eighth and a sixteenth of the side."""
        fine = self.fine(self.stem(pictures * 2 - 1))
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)

    def forward(self, pictures: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Logits by head: cells [B, n, 16, 16], and whole [B, n]."""
        coarse = self.trunk(pictures)[2]
        cells = self.cells(coarse).split(list(HEADS.values()), dim=1)
        whole = self.whole(F.silu(self.pooled(coarse))).split(list(WHOLE.values()), dim=1)
        return dict(zip(HEADS, cells, strict=True)), dict(zip(WHOLE, whole, strict=True))

    def pooled(self, coarse: torch.Tensor) -> torch.Tensor:
        return self.feature(torch.cat((coarse.mean((2, 3)), coarse.amax((2, 3))), dim=1))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 64]: the space in which the built-in model's FID and KID are measured."""
        return self.pooled(self.trunk(pictures)[2])


@dataclass(frozen=True)
class Seen:
    """One object read from a picture; indices into the world's lists, centre in pixels."""

    shape: int
    colour: int
    size: int
    outlined: bool
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What the reader sees in one picture."""

    objects: tuple[Seen, ...]
    background: int
    ground: int
    doubtful: bool  # an object or attribute below its confidence threshold


@torch.inference_mode()
def read(reader: Reader, pictures: torch.Tensor) -> list[Reading]:
    """Readings of pictures [B, 3, 256, 256] in [0, 1]."""
    cells, whole = reader(pictures)
    cells = {name: value.float() for name, value in cells.items()}
    peak = cells["peak"].sigmoid()[:, 0]
    summit = peak == F.max_pool2d(peak[:, None], 5, 1, 2)[:, 0]
    whole = {name: whole[name].float().softmax(1).max(1) for name in ("background", "ground")}
    doubtful = ((peak > DOUBT) & (peak < PRESENT) & summit).flatten(1).any(1)
    doubtful |= (whole["background"].values < CERTAIN) | (whole["ground"].values < CERTAIN)
    row, i, j = (summit & (peak >= PRESENT)).nonzero(as_tuple=True)
    best = {name: cells[name][row, :, i, j].softmax(1).max(1) for name in ("shape", "colour", "size", "outlined")}
    doubtful[row[torch.stack([b.values < CERTAIN for b in best.values()]).any(0)]] = True
    offset = cells["offset"][row, :, i, j]
    x, y = (j + 0.5 + offset[:, 0]) * SIDE / GRID, (i + 0.5 + offset[:, 1]) * SIDE / GRID
    columns = [best[name].indices.tolist() for name in ("shape", "colour", "size", "outlined")]
    found: list[list[Seen]] = [[] for _ in range(len(pictures))]
    for at, shape, colour, size, outlined, cx, cy in zip(row.tolist(), *columns, x.tolist(), y.tolist(), strict=True):
        found[at].append(Seen(shape, colour, size, bool(outlined), cx, cy))
    kinds, grounds = whole["background"].indices.tolist(), whole["ground"].indices.tolist()
    return [Reading(tuple(o), *rest) for o, *rest in zip(found, kinds, grounds, doubtful.tolist(), strict=True)]


def load_reader(path: Path = WEIGHTS, *, device: str | torch.device = "cpu") -> Reader:
    """The shipped reader, in float32."""
    from safetensors.torch import load_file

    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return reader.eval().requires_grad_(False).to(device)
