"""Whether a picture, as read, shows what its caption says."""

from __future__ import annotations

from itertools import permutations

import torch

from vivace.builtin.captions import Said
from vivace.builtin.reader import Reading, Seen
from vivace.builtin.world import NO_RELATION, stands

TOLERANCE = 0.5  # a stated relation holds when its axis is at least half of the other one
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


def agrees(reading: Reading, facts: list[int]) -> bool:
    """Whether a reading is wholly right about a scene (one row of `captions.facts`), in every attribute."""
    count, kind, ground, *rest = facts
    truth = sorted(tuple(rest[4 * slot : 4 * slot + 4]) for slot in range(count))
    seen = sorted((o.shape, o.colour, o.size, int(o.outlined)) for o in reading.objects)
    return seen == truth and (kind, ground) == (reading.background, reading.ground) and not reading.doubtful
