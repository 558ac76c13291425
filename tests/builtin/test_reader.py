"""The shipped reader reads renders and reconstructions back, and the judge is strict."""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny

from vivace import builtin
from vivace.builtin.captions import facts, say
from vivace.builtin.judge import agrees, judge
from vivace.builtin.reader import Reader, load_reader, read
from vivace.builtin.render import render
from vivace.builtin.world import NO_RELATION, Scenes, sample


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample(120, torch.Generator().manual_seed(17))[:100]


def test_reads_renders_entirely_right(reader: Reader, scenes: Scenes) -> None:
    readings = read(reader, render(scenes))
    assert sum(agrees(r, f) for r, f in zip(readings, facts(scenes), strict=True)) >= 99


def test_reads_reconstructions_entirely_right(reader: Reader, scenes: Scenes) -> None:
    folder = builtin.__path__[0] + "/model/vae"
    vae = AutoencoderTiny.from_pretrained(folder)
    some = scenes[:40]
    with torch.no_grad():
        pictures = vae(render(some) * 2 - 1).sample / 2 + 0.5
    readings = read(reader, pictures.clamp(0, 1))
    assert sum(agrees(r, f) for r, f in zip(readings, facts(some), strict=True)) >= 39


def test_a_wrong_scene_is_not_agreed_with(reader: Reader, scenes: Scenes) -> None:
    readings = read(reader, render(scenes[:20]))
    assert not any(agrees(r, f) for r, f in zip(readings, facts(scenes)[1:21], strict=True))


def test_noise_is_doubtful_or_empty(reader: Reader) -> None:
    noise = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    assert all(r.doubtful or not r.objects for r in read(reader, noise))


def test_the_judge_takes_the_truth_and_refuses_each_change(reader: Reader, scenes: Scenes) -> None:
    rng = random.Random(3)
    for reading, row in zip(read(reader, render(scenes)), facts(scenes), strict=True):
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
