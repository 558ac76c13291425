"""Every family: requests that share calls get what they would have got alone."""

import dataclasses

import numpy as np
import pytest
import torch

from vivace.families import FAMILIES
from vivace.serve import Engine
from vivace.serve.call import BUCKET, Axes, Unsplittable, split
from vivace.serve.gather import Gather


@pytest.mark.parametrize("name", FAMILIES)
def test_alone_or_together(name, pixels, requests):
    family = FAMILIES[name]
    # In double precision a wrong row shows and the order of sums does not: random weights amplify fp32's noise.
    pipe = family.tiny().to(torch.float64)
    with Engine(models={"tiny": pipe}) as engine:
        alone = [engine.submit(one).result(60) for one in requests(family, pipe, deterministic=True)]
        for _ in range(5):  # that they meet is likely, not certain
            jobs = [engine.submit(one) for one in requests(family, pipe)]
            together = [job.result(60) for job in jobs]
            if max(one.calls["requests_per_call"] for one in together) > 1:
                break
    assert max(one.calls["requests_per_call"] for one in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert len(one.pictures) == len(other.pictures)
        for mine, theirs in zip(one.pictures, other.pictures, strict=True):
            assert np.abs(pixels(mine) - pixels(theirs)).max() <= 1


def digest(tensor):
    return tensor.numpy().tobytes()


def test_shared_arguments_join_only_when_equal():
    axes = Axes(shared=frozenset({"ids"}))
    ids = torch.arange(2)
    x = torch.zeros(2, 3)
    same = [axes.describe({"x": x, "ids": ids.clone()}, digest=digest) for _ in range(2)]
    other = axes.describe({"x": x, "ids": ids + 1}, digest=digest)
    assert same[0] == same[1] != other


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(1, 4)},
        {"x": torch.zeros(1, 3, dtype=torch.float64)},
        {"x": torch.zeros(1, 3), "return_dict": True},
        {"x": torch.zeros(1, 3), "kwargs": {"scale": 2}},
    ],
)
def test_different_calls_stay_apart(other):
    plain = {"x": torch.zeros(1, 3), "return_dict": False, "kwargs": {"scale": 1}}
    mine = Axes().describe(plain, digest=digest)
    assert mine != Axes().describe({**plain, **other}, digest=digest)
    assert mine == Axes().describe({**plain, "x": torch.ones(1, 3)}, digest=digest)


def test_what_cannot_be_compared_goes_alone():
    assert Axes().describe({"x": torch.zeros(1, 3), "f": torch.Generator()}, digest=digest) is None
    assert Axes().describe({"steps": 3}, digest=digest) is None


def test_split_refuses_what_has_no_rows():
    parts = split((torch.arange(3), [torch.arange(3)], None, {"a": torch.arange(3)}), [1, 2])
    assert parts[1][0].tolist() == parts[1][1][0].tolist() == parts[1][3]["a"].tolist() == [1, 2]
    for out in (torch.zeros(4), torch.tensor(1.0), object()):
        with pytest.raises(Unsplittable):
            split(out, [1, 2])


def text(length, *, words=None, fill=1.0):
    mask = None if words is None else torch.arange(length)[None] < words
    return {"x": torch.zeros(1, 4), "text": torch.full((1, length, 2), fill), "mask": mask}


def test_texts_of_one_bucket_join_and_others_do_not():
    axes = Axes(padded={"text": "mask"})
    short, long, longer = (axes.describe(text(n), digest=digest) for n in (3, BUCKET, BUCKET + 1))
    assert short == long != longer
    assert short == axes.describe(text(5, words=4), digest=digest)
    assert axes.describe({"x": torch.zeros(1, 4), "text": torch.zeros(1, 3, 2)}, digest=digest) == short
    plain = Axes()
    assert plain.describe(text(3), digest=digest) != plain.describe(text(4), digest=digest)


def test_texts_are_padded_to_the_bucket_and_the_mask_says_where():
    axes = Axes(padded={"text": "mask"})
    joined = axes.join([text(3), text(5, words=4, fill=2.0)], rows=[1, 1], cat=lambda name, parts: torch.cat(parts))
    assert joined["text"].shape == (2, BUCKET, 2)
    assert joined["mask"].sum(1).tolist() == [3, 4]
    assert joined["text"][0].sum(1).tolist() == [2.0] * 3 + [0.0] * (BUCKET - 3)
    same = axes.join([text(3), text(3)], rows=[1, 1], cat=lambda name, parts: torch.cat(parts))
    assert same["text"].shape == (2, 3, 2)
    assert same["mask"] is None


PADDED = [name for name, family in FAMILIES.items() if family.padded]


@pytest.mark.parametrize("name", PADDED)
def test_prompts_of_different_lengths_share_calls(name, order, pixels, start):
    pipe = FAMILIES[name].tiny().to(torch.float64)
    prompts = ("a red circle", "a blue ring left of a star above a green square", "one")
    ask = [order(prompt=prompt, steps=6, seed=seed) for seed, prompt in enumerate(prompts)]
    engine = start(pipe, gather=lambda: Gather(share=100.0, longest=0.2))
    alone = [engine.submit(dataclasses.replace(one, deterministic=True)).result(120) for one in ask]
    met = False
    for _ in range(5):  # that they meet is likely, not certain
        together = [job.result(120) for job in [engine.submit(one) for one in ask]]
        met = met or all(one.calls["requests_per_call"] > 1 for one in together)
        if met:
            break
    assert met
    for one, other in zip(alone, together, strict=True):
        assert np.abs(pixels(one.pictures[0]) - pixels(other.pictures[0])).max() <= 1
