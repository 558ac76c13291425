"""The built-in model's world: what a scene can hold, and how scenes are drawn at random.

A scene is one to three flat objects on a background. Lengths are pixels of a 256 x 256 picture, x to the right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

SIDE = 256
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
SIZES = ("small", "medium", "large")
RADII = (24.0, 32.0, 42.0)  # of SIZES; every scene varies them by up to 4 %
COLOURS = {
    "red": (225, 45, 45),
    "orange": (250, 140, 25),
    "yellow": (250, 222, 50),
    "green": (40, 165, 70),
    "cyan": (70, 215, 230),
    "blue": (40, 85, 225),
    "purple": (140, 60, 190),
    "pink": (252, 150, 195),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
BACKGROUNDS = ("plain", "gradient", "striped", "checked")
RELATIONS = ("left", "right", "above", "below")
CONVERSE = (1, 0, 3, 2)  # of RELATIONS, by index
NO_RELATION = -1
SLOTS = 3
RING = SHAPES.index("ring")  # a ring is never outlined: its two edges would touch
GAP = 6.0  # least distance between objects, and to the border
DOMINANCE = 1.2  # a stated "left" is drawn with |dx| >= 1.2 |dy|


@dataclass
class Scenes:
    """A batch of scenes as tensors; unused slots hold valid but meaningless values."""

    count: torch.Tensor  # [B] 1..3
    shape: torch.Tensor  # [B, 3] index into SHAPES
    colour: torch.Tensor  # [B, 3] index into COLOURS
    size: torch.Tensor  # [B, 3] index into SIZES
    outlined: torch.Tensor  # [B, 3] bool
    centre: torch.Tensor  # [B, 3, 2] x, y in pixels
    radius: torch.Tensor  # [B, 3] pixels
    relation: torch.Tensor  # [B, 2] object 0 to 1, and 1 to 2: index into RELATIONS, or NO_RELATION
    background: torch.Tensor  # [B] index into BACKGROUNDS
    ground: torch.Tensor  # [B] its colour, index into COLOURS
    pattern: torch.Tensor  # [B, 3] uniform in [0, 1): orientation, period, phase
    tint: torch.Tensor  # [B, 4, 3] colour offsets of the three objects and the ground, in [-1, 1]

    def __len__(self) -> int:
        return self.count.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def present(self) -> torch.Tensor:
        """Which slots hold an object: [B, 3] bool."""
        return torch.arange(SLOTS, device=self.count.device) < self.count[:, None]


def concatenate(parts: list[Scenes]) -> Scenes:
    """One batch out of several."""
    return Scenes(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)})


def held_out(colour: torch.Tensor, shape: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
    """Whether an object of this colour and shape standing in this relation is kept from the generator: 20 of 320."""
    return ((7 * colour + 3 * shape + 5 * relation) % 16 == 5) & (relation != NO_RELATION)


def holds_out(scenes: Scenes) -> torch.Tensor:
    """Which scenes state a held-out combination, by subject or, conversely, by object of a relation: [B] bool."""
    converse = torch.tensor((*CONVERSE, NO_RELATION), device=scenes.count.device)[scenes.relation]
    said = held_out(scenes.colour[:, :2], scenes.shape[:, :2], scenes.relation)
    heard = held_out(scenes.colour[:, 1:], scenes.shape[:, 1:], converse)
    return (said | heard).any(1)


def sample(n: int, generator: torch.Generator, *, counts: tuple[float, float, float] = (0.2, 0.4, 0.4)) -> Scenes:
    """About n scenes (a few are dropped: too crowded) on the generator's device, object counts in these proportions."""
    device = generator.device

    def pick(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    count = torch.multinomial(torch.tensor(counts, device=device), n, replacement=True, generator=generator) + 1
    shape, size = pick(len(SHAPES), n, SLOTS), pick(len(SIZES), n, SLOTS)
    ground = pick(len(COLOURS), n)
    colour = (ground[:, None] + 1 + pick(len(COLOURS) - 1, n, SLOTS)) % len(COLOURS)  # never the ground's
    radius = torch.tensor(RADII, device=device)[size] * (0.96 + 0.08 * uniform(n, SLOTS))
    stated = torch.arange(2, device=device) < count[:, None] - 1
    stated &= uniform(n, 1) < 0.9
    relation = torch.where(stated, pick(len(RELATIONS), n, 2), NO_RELATION)
    centre, fits = place(radius, count, relation, generator)
    scenes = Scenes(
        count=count,
        shape=shape,
        colour=colour,
        size=size,
        outlined=(uniform(n, SLOTS) < 0.3) & (shape != RING),
        centre=centre,
        radius=radius,
        relation=relation,
        background=pick(len(BACKGROUNDS), n),
        ground=ground,
        pattern=uniform(n, 3),
        tint=uniform(n, 4, 3) * 2 - 1,
    )
    return scenes[(fits & ~ambiguous(scenes)).nonzero()[:, 0]]


def ambiguous(scenes: Scenes) -> torch.Tensor:
    """Whether two objects share shape and colour, so that "the red star" would not say which: [B] bool."""
    kind = scenes.shape * len(COLOURS) + scenes.colour
    kind = torch.where(scenes.present(), kind, -1 - torch.arange(SLOTS, device=kind.device))
    return (kind[:, 0] == kind[:, 1]) | (kind[:, 0] == kind[:, 2]) | (kind[:, 1] == kind[:, 2])


def place(
    radius: torch.Tensor, count: torch.Tensor, relation: torch.Tensor, generator: torch.Generator, tries: int = 48
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres [B, 3, 2] that keep the gaps and the relations, and whether one was found [B]."""
    device, n = radius.device, radius.shape[0]
    low = (radius + GAP)[:, None, :, None]  # [B, 1, 3, 1]
    draw = torch.rand(n, tries, SLOTS, 2, generator=generator, device=device)
    for first in (0, 1, 0):  # swap coordinates until they stand in the stated order
        draw = ordered(draw, first, relation[:, first])
    centre = low + draw * (SIDE - 2 * low)
    good = torch.ones(n, tries, dtype=torch.bool, device=device)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart = (centre[:, :, a] - centre[:, :, b]).norm(dim=-1) >= (radius[:, a] + radius[:, b] + GAP)[:, None]
        good &= apart | (count[:, None] <= b)
    for first in (0, 1):
        step = centre[:, :, first + 1] - centre[:, :, first]
        good &= stands(step, relation[:, first, None], DOMINANCE) | (relation[:, first, None] == NO_RELATION)
    best = good.float().argmax(1)
    return centre[torch.arange(n, device=device), best], good.any(1)


def ordered(draw: torch.Tensor, first: int, relation: torch.Tensor) -> torch.Tensor:
    """Swap one coordinate of `first` and `first + 1` in draws [B, K, 3, 2] where it contradicts the relation."""
    a, b = draw[:, :, first], draw[:, :, first + 1]
    axis = torch.arange(2, device=draw.device)
    along = (relation[:, None] // 2 == axis) & (relation[:, None] != NO_RELATION)  # [B, 2]
    ascending = (relation % 2 == 0)[:, None, None]  # left and above: the first has the smaller coordinate
    swap = along[:, None] & torch.where(ascending, a > b, a < b)
    out = draw.clone()
    out[:, :, first], out[:, :, first + 1] = torch.where(swap, b, a), torch.where(swap, a, b)
    return out


def stands(step: torch.Tensor, relation: torch.Tensor, dominance: float) -> torch.Tensor:
    """Whether `step` = object - subject ([..., 2] pixels) makes "subject is `relation` object" true.

    `dominance` is the least ratio of the relation's axis to the other one.
    """
    horizontal = relation < 2
    along = torch.where(horizontal, step[..., 0], step[..., 1])
    across = torch.where(horizontal, step[..., 1], step[..., 0]).abs()
    along = torch.where(relation % 2 == 0, along, -along)
    return (along > 8.0) & (along >= dominance * across)
