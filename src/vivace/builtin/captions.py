"""What English says of a scene: captions in six grammars, and the facts each one states."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vivace.builtin.world import BACKGROUNDS, COLOURS, NO_RELATION, SHAPES, SIZES, SLOTS, Scenes

PHRASES = (
    ("left of", "to the left of", "on the left of"),
    ("right of", "to the right of", "on the right of"),
    ("above", "over", "higher than"),
    ("below", "under", "beneath"),
)
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Thing:
    """One object as a caption describes it: indices into SHAPES, COLOURS and SIZES."""

    shape: int
    colour: int
    size: int | None  # None: left open
    outlined: bool

    def name(self, rng: random.Random) -> str:
        """With its article: "a small outlined red star"."""
        fill = "outlined" if self.outlined else rng.choice(("", "", "", "filled"))
        words = ["" if self.size is None else SIZES[self.size], fill, COLOUR_NAMES[self.colour], SHAPES[self.shape]]
        phrase = " ".join(word for word in words if word)
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase

    def short(self) -> str:
        return f"the {COLOUR_NAMES[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Said:
    """The facts that a caption states."""

    things: tuple[Thing, ...]
    relations: tuple[int, ...]  # thing 0 to 1, thing 1 to 2: index into RELATIONS, or NO_RELATION
    background: tuple[int, int] | None  # kind, colour; None: left open

    def labels(self) -> list[int]:
        """The facts as 17 class numbers, 0 for what is not said (what the text encoder is taught to tell)."""
        row = [len(self.things)]
        for slot in range(SLOTS):
            if slot < len(self.things):
                thing = self.things[slot]
                size = 0 if thing.size is None else thing.size + 1
                row += [thing.shape + 1, thing.colour + 1, size, int(thing.outlined)]
            else:
                row += [0, 0, 0, 0]
        row += [relation + 1 for relation in (*self.relations, NO_RELATION, NO_RELATION)[:2]]
        return row + ([0, 0] if self.background is None else [self.background[0] + 1, self.background[1] + 1])


LABEL_CLASSES = (4, *(len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, 2) * SLOTS, 5, 5, 5, 11)


def say(scene: list[int], rng: random.Random) -> tuple[str, Said]:
    """A caption for one row of `facts`, and what it states."""
    count, kind, ground, *rest = scene
    rows = [rest[4 * slot : 4 * slot + 4] for slot in range(count)]
    things = tuple(Thing(s, c, z if rng.random() < 0.7 else None, bool(o)) for s, c, z, o in rows)
    said = Said(things, tuple(rest[12 : 11 + count]), (kind, ground) if rng.random() < 0.85 else None)
    return phrase(said, rng), said


def facts(scenes: Scenes) -> list[list[int]]:
    """What `say` needs of every scene, read to the host once."""
    import torch

    parts = torch.stack((scenes.shape, scenes.colour, scenes.size, scenes.outlined.long()), dim=-1).flatten(1)
    head = torch.stack((scenes.count, scenes.background, scenes.ground), dim=1)
    return torch.cat((head, parts, scenes.relation), dim=1).tolist()


def phrase(said: Said, rng: random.Random) -> str:
    """One of the grammars' sentences for these facts."""
    body = objects(said, rng)
    whole = body if said.background is None else grounded(body, said.background, rng)
    opening = rng.choice(("", "", "", "a picture of ", "a drawing of ", "an image showing "))
    # A picture is of things: where the background comes first, nothing can open the sentence.
    return opening + whole if whole.startswith(body) else whole


def objects(said: Said, rng: random.Random) -> str:
    """The things and their relations."""
    names = [thing.name(rng) for thing in said.things]
    links = [rng.choice(PHRASES[r]) if r != NO_RELATION else None for r in said.relations]
    if len(names) == 1 or all(link is None for link in links):
        return listed(names)
    first, second = said.things[0].short(), said.things[1].short()
    if len(names) == 2:
        return rng.choice(
            (
                f"{names[0]} {links[0]} {names[1]}",
                f"{names[0]} {links[0]} {names[1]}",
                f"{names[0]} that is {links[0]} {names[1]}",
                f"{names[0]} and {names[1]}, {first} is {links[0]} {second}",
            )
        )
    return rng.choice(
        (
            f"{names[0]} {links[0]} {names[1]}, which is {links[1]} {names[2]}",
            f"{names[0]} {links[0]} {names[1]}, and {second} is {links[1]} {names[2]}",
            f"{names[0]} {links[0]} {names[1]} that is {links[1]} {names[2]}",
        )
    )


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def grounded(body: str, background: tuple[int, int], rng: random.Random) -> str:
    """The sentence with its background before or after."""
    kind, colour = BACKGROUNDS[background[0]], COLOUR_NAMES[background[1]]
    adjective = rng.choice(("", "", "plain ")) if kind == "plain" else kind + " "
    phrase = f"{adjective}{colour} background"
    article = "an" if phrase[0] in "aeiou" else "a"
    if rng.random() < 0.15:
        return f"on {article} {phrase}, {body}"
    return f"{body} {rng.choice(('on', 'on', 'against'))} {article} {phrase}"


def vocabulary() -> list[str]:
    """Every word and mark that a caption can hold, for the tokenizer."""
    text = (
        "a an the and on against of to that is which than background picture drawing image showing outlined filled , ."
    )
    words = [*text.split(), *SHAPES, *SIZES, *COLOURS, *BACKGROUNDS]
    words += [word for group in PHRASES for wording in group for word in wording.split()]
    return sorted(set(words))
