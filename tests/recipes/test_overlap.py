"""Captions of an exam that a training drew are counted, and left out of what is examined."""

import json

import torch

from vivace.distill import read_config
from vivace.distill.data.world import World
from vivace.evals.builtin import draw_exam


def test_the_very_captions_of_a_training_are_counted(distill_recipe):
    recipe = distill_recipe("overlap")
    config = read_config("builtin", assignments=["batch=8"])
    drawn = World(batch=8, seed=config.seed, side=32)
    captions = [caption for _ in range(3) for caption in next(drawn).captions]
    assert recipe.trained(config, batches=3, device="cpu") == set(captions)


def test_what_was_trained_on_is_left_out(distill_recipe):
    recipe = distill_recipe("overlap")
    exam = draw_exam(9, seed=3)
    found = recipe.Overlap.of(exam, {exam.captions[0], exam.captions[4], "a caption of no exam"})
    rest = found.rest()
    kept = [1, 2, 3, 5, 6, 7, 8]
    assert rest.captions == tuple(exam.captions[place] for place in kept)
    assert rest.said == tuple(exam.said[place] for place in kept)
    assert all(torch.equal(getattr(rest.scenes, n), getattr(exam.scenes, n)[kept]) for n in vars(exam.scenes))
    rows = found.to_dict()["exam"]
    assert [rows[name]["trained on"] for name in ("all", "1 object", "2 objects", "3 objects")] == [2, 1, 1, 0]


def test_the_count_is_written_with_its_command(distill_recipe, tmp_path, capsys):
    path = tmp_path / "overlap.json"
    distill_recipe("overlap").main(["builtin", "--batches", "40", "--captions", "300", "-o", str(path)])
    found = json.loads(path.read_text())
    assert found["training"] == {"batches": 40, "of each": 256, "seed": 0, "device": "cpu"}
    assert 0 < found["exam"]["1 object"]["share"] < 0.1
    assert found["exam"]["3 objects"]["share"] == 0
    assert "1 object: " in capsys.readouterr().out


def test_an_exam_of_unseen_captions_says_what_it_left_out(distill_recipe):
    recipe = distill_recipe("examine")
    asked = ["student", "--captions", "72", "--seed", "7"]
    whole, about = recipe.examination(recipe.parsed(asked), device="cpu")
    assert "left out" not in about
    rest, about = recipe.examination(recipe.parsed([*asked, "--unseen", "builtin", "--batches", "10"]), device="cpu")
    assert about["left out"]["exam"]["all"] == {"captions": 72, "trained on": 1, "share": 1 / 72}
    assert len(rest.captions) == len(rest.scenes) == 71
    assert {*whole.captions} > {*rest.captions}
