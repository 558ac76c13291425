"""Whether a picture, as read, shows what its caption says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import dist

import torch

from vivace.builtin.captions import Said, facts
from vivace.builtin.reader import Reading, Seen
from vivace.builtin.world import NO_RELATION, Scenes, stands

TOLERANCE = 0.5  # a stated relation holds when its axis is at least half of the other one
NEAR = 8.0  # pixels, half a cell of the reader: how far from its centre an object may be read
PARTS = ("count", "shape", "colour", "size", "fill", "relation", "background")


def judge(reading: Reading, said: Said) -> dict[str, bool]:
    """Verdict by part, and "right" for all of them with nothing doubtful; an extra or missing object is wrong.

    The objects are matched to the things said in the order that satisfies the most parts.
    """
    counted = len(reading.objects) == len(said.things)
    verdict = dict.fromkeys(PARTS, False) | {"count": counted}
    if counted:
        verdict |= max((match(order, said) for order in permutations(reading.objects)), key=lambda v: sum(v.values()))
    ground = (reading.background, reading.ground)
    verdict["background"] = said.background is None or said.background == ground
    return verdict | {"right": all(verdict.values()) and not reading.doubtful}


def match(order: tuple[Seen, ...], said: Said) -> dict[str, bool]:
    """The parts that hold when the objects are taken in this order."""
    pairs = list(zip(order, said.things, strict=True))
    return {
        "shape": all(seen.shape == thing.shape for seen, thing in pairs),
        "colour": all(seen.colour == thing.colour for seen, thing in pairs),
        "size": all(thing.size is None or seen.size == thing.size for seen, thing in pairs),
        "fill": all(seen.outlined == thing.outlined for seen, thing in pairs),
        "relation": all(
            relation == NO_RELATION or holds(order[i], order[i + 1], relation)
            for i, relation in enumerate(said.relations)
        ),
    }


def holds(subject: Seen, target: Seen, relation: int) -> bool:
    """Whether the subject stands in this relation to the target; near a diagonal two relations hold."""
    step = torch.tensor([target.x - subject.x, target.y - subject.y])
    return bool(stands(step, torch.tensor(relation), TOLERANCE))


def agree(readings: Sequence[Reading], scenes: Scenes) -> list[bool]:
    """Which readings are wholly right about their scenes: every attribute, and every object in its place.

    An object read within NEAR of its centre stands to the others as the scene's does: every relation that a caption can
    state of the scene, in whatever wording, then holds in the reading too.
    """
    rows = zip(readings, facts(scenes), scenes.centre.tolist(), strict=True)
    return [_agrees(reading, row, centres) for reading, row, centres in rows]


def _agrees(reading: Reading, row: list[int], centres: list[list[float]]) -> bool:
    count, kind, ground, *rest = row
    # No two objects of a scene share shape and colour, so that both sides sort alike.
    truth = sorted((rest[4 * slot : 4 * slot + 4], centres[slot]) for slot in range(count))
    seen = sorted(([o.shape, o.colour, o.size, int(o.outlined)], [o.x, o.y]) for o in reading.objects)
    return (
        [kind, ground] == [reading.background, reading.ground]
        and not reading.doubtful
        and [attributes for attributes, _ in seen] == [attributes for attributes, _ in truth]
        and all(dist(a, b) <= NEAR for (_, a), (_, b) in zip(seen, truth, strict=True))
    )
