"""The shipped reader reads renders and reconstructions back, and the judge is strict."""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny

from vivace import builtin
from vivace.builtin.captions import facts, say
from vivace.builtin.judge import NEAR, agree, holds, judge
from vivace.builtin.reader import Reader, Reading, Seen, load_reader, read
from vivace.builtin.render import render
from vivace.builtin.world import NO_RELATION, Scenes, sample


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample(120, torch.Generator().manual_seed(17))[:100]


@pytest.fixture(scope="module")
def readings(reader: Reader, scenes: Scenes) -> list[Reading]:
    """Of the scenes' renders."""
    return read(reader, render(scenes))


def test_reads_renders_entirely_right(readings: list[Reading], scenes: Scenes) -> None:
    assert sum(agree(readings, scenes)) >= 99


def test_reads_reconstructions_entirely_right(reader: Reader, scenes: Scenes) -> None:
    folder = builtin.__path__[0] + "/model/vae"
    vae = AutoencoderTiny.from_pretrained(folder)
    some = scenes[:20]
    with torch.no_grad():
        pictures = vae(render(some) * 2 - 1).sample / 2 + 0.5
    assert all(agree(read(reader, pictures.clamp(0, 1)), some))


def test_a_wrong_scene_is_not_agreed_with(readings: list[Reading], scenes: Scenes) -> None:
    assert not any(agree(readings[:20], scenes[1:21]))


def test_a_reading_with_two_objects_in_each_other_s_place_is_not_agreed_with(
    readings: list[Reading], scenes: Scenes
) -> None:
    two = (scenes.count == 2).nonzero()[:, 0]
    pairs, of_pairs = scenes[two], [readings[index] for index in two.tolist()]
    assert all(agree(of_pairs, pairs))
    swapped = []
    for reading in of_pairs:
        first, second = reading.objects
        moved = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
        swapped.append(replace(reading, objects=moved))
    assert not any(agree(swapped, pairs))


def test_whoever_is_agreed_with_sees_every_relation_that_can_be_stated() -> None:
    generator = torch.Generator().manual_seed(4)
    pairs = sample(2000, generator, counts=(0.0, 1.0, 0.0))
    pairs = pairs[(pairs.relation[:, 0] != NO_RELATION).nonzero()[:, 0]]
    angle = 2 * torch.pi * torch.rand(len(pairs), 2, generator=generator)
    read_at = pairs.centre[:, :2] + 0.999 * NEAR * torch.stack((angle.cos(), angle.sin()), dim=-1)
    readings = []
    for row, places in zip(facts(pairs), read_at.tolist(), strict=True):
        _, kind, ground, *rest = row
        objects = [
            Seen(*rest[4 * slot : 4 * slot + 3], bool(rest[4 * slot + 3]), *place) for slot, place in enumerate(places)
        ]
        readings.append(Reading(tuple(objects), kind, ground, doubtful=False))
    assert all(agree(readings, pairs))
    stated = pairs.relation[:, 0].tolist()
    assert all(holds(*reading.objects, relation) for reading, relation in zip(readings, stated, strict=True))


def test_noise_is_doubtful_or_empty(reader: Reader) -> None:
    noise = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    assert all(r.doubtful or not r.objects for r in read(reader, noise))


def test_the_judge_takes_the_truth_and_refuses_each_change(readings: list[Reading], scenes: Scenes) -> None:
    rng = random.Random(3)
    for reading, row in zip(readings, facts(scenes), strict=True):
        _, said = say(row, rng)
        assert judge(reading, said)["right"] == (not reading.doubtful)
        thing = said.things[0]
        others = said.things[1:]
        wrong = replace(said, things=(replace(thing, colour=(thing.colour + 5) % 10), *others))
        if all(other.colour != wrong.things[0].colour for other in others):
            assert not judge(reading, wrong)["right"]
        if len(said.things) == 2 and said.relations[0] != NO_RELATION:
            turned = replace(said, relations=((1, 0, 3, 2)[said.relations[0]],))
            assert not judge(reading, turned)["right"]
        assert not judge(replace(reading, objects=reading.objects[1:]), said)["right"]
        assert not judge(replace(reading, doubtful=True), said)["right"]


def test_features_are_64_wide_and_differ(reader: Reader, scenes: Scenes) -> None:
    features = reader.features(render(scenes[:8]))
    assert features.shape == (8, 64)
    assert features.std(0).mean() > 0.01
