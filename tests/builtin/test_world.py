"""Scenes keep their promises, and captions say what is there."""

import random

import pytest
import torch

from vivace.builtin.captions import LABEL_CLASSES, facts, say, vocabulary
from vivace.builtin.world import (
    DOMINANCE,
    GAP,
    NO_RELATION,
    RELATIONS,
    RING,
    SIDE,
    Scenes,
    concatenate,
    holds_out,
    sample,
    stands,
)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample(3000, torch.Generator().manual_seed(5))


def test_objects_keep_their_distance_and_stay_inside(scenes: Scenes) -> None:
    here = scenes.present()
    edge = torch.minimum(scenes.centre, SIDE - scenes.centre).amin(2) - scenes.radius
    assert (edge[here] >= GAP - 1e-3).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = here[:, a] & here[:, b]
        apart = (scenes.centre[:, a] - scenes.centre[:, b]).norm(dim=1) - scenes.radius[:, a] - scenes.radius[:, b]
        assert (apart[both] >= GAP - 1e-3).all()


def test_stated_relations_hold_where_the_objects_stand(scenes: Scenes) -> None:
    for first in (0, 1):
        relation = scenes.relation[:, first]
        stated = relation != NO_RELATION
        step = scenes.centre[:, first + 1] - scenes.centre[:, first]
        assert stated.sum() > 500
        assert stands(step, relation, DOMINANCE)[stated].all()
        opposite = torch.tensor((1, 0, 3, 2, NO_RELATION))[relation]
        assert not stands(step, opposite, DOMINANCE)[stated].any()


def test_every_attribute_occurs_and_none_contradicts_another(scenes: Scenes) -> None:
    assert set(scenes.count.tolist()) == {1, 2, 3}
    for values, n in ((scenes.shape, 8), (scenes.colour, 10), (scenes.size, 3), (scenes.ground, 10)):
        assert len(values.unique()) == n
    assert (scenes.colour != scenes.ground[:, None]).all()
    assert not (scenes.outlined & (scenes.shape == RING)).any()


def test_the_same_seed_gives_the_same_scenes() -> None:
    first, second = (sample(50, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first.centre, second.centre)
    assert len(concatenate([first, second])) == 2 * len(first)


def test_held_out_combinations_are_a_part_and_hold_in_either_direction(scenes: Scenes) -> None:
    out = holds_out(scenes)
    assert 0.03 < out.float().mean() < 0.25
    assert not out[scenes.count == 1].any()
    pairs = scenes[((scenes.count == 2) & (scenes.relation[:, 0] != NO_RELATION)).nonzero()[:, 0]]
    turned = Scenes(**vars(pairs))
    for name in ("shape", "colour"):
        setattr(turned, name, getattr(pairs, name)[:, [1, 0, 2]])
    turned.relation = torch.tensor((1, 0, 3, 2, NO_RELATION))[pairs.relation]
    assert torch.equal(holds_out(turned), holds_out(pairs))


def test_captions_use_the_vocabulary_and_state_the_facts(scenes: Scenes) -> None:
    rng, words = random.Random(1), set(vocabulary())
    for row in facts(scenes)[:500]:
        text, said = say(row, rng)
        assert set(text.replace(",", " ,").split()) <= words
        assert len(said.things) == row[0]
        assert all(0 <= label < n for label, n in zip(said.labels(), LABEL_CLASSES, strict=True))
        assert (said.background is None) == ("background" not in text)


def test_a_caption_that_begins_with_its_background_has_no_other_opening(scenes: Scenes) -> None:
    rng = random.Random(2)
    texts = [say(row, rng)[0] for row in facts(scenes)[:1000]]
    assert 50 < sum(text.startswith(("on a ", "on an ")) for text in texts) < 200
    assert sum(text.startswith(("a picture of ", "a drawing of ", "an image showing ")) for text in texts) > 300
    assert not any(f"{word} on a" in text for text in texts for word in ("of", "showing", "picture", "drawing"))


def test_a_relation_is_named_by_the_four_words() -> None:
    steps = torch.tensor([[40.0, 5.0], [-40.0, 5.0], [5.0, 40.0], [5.0, -40.0]])
    for index, name in enumerate(RELATIONS):
        held = [bool(stands(step, torch.tensor(index), DOMINANCE)) for step in steps]
        assert held == [i == index for i in range(4)], name
