"""What a batch keeps for its backward pass, counted, and what follows from it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vivace.distill import Critic, DistillConfig, Student
from vivace.distill.activations import STATE, kept, of_picture, room_of, settle
from vivace.distill.actors import blank_item
from vivace.distill.reading import from_dict
from vivace.distill.student import recompute, trainable
from vivace.distill.trainer import make_accelerator, make_training
from vivace.errors import InputError
from vivace.families import FAMILIES


@pytest.fixture
def training(config, tmp_path):
    """One that keeps its activations, with a critic and an adversary."""
    chosen: DistillConfig = config(tmp_path, critic=Critic(rank=2))
    return make_training(chosen, make_accelerator(chosen, tmp_path), pipe=FAMILIES["sdxl"].tiny())


def spared(training):
    """Of student, critic and features, whether activations are computed again."""
    denoisers = [training.learners[name].plain for name in ("student", "critic")]
    return [one.is_gradient_checkpointing for one in denoisers] + [training.objective.features.recompute]


def test_bytes_by_hand():
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)
    # The linear's input, and what tanh gives, which the square keeps too: the weight counts for nothing.
    assert kept(lambda: layer(x).tanh().square().sum(), but=[layer]) == 4 * (3 * 8 + 3 * 4)
    assert kept(lambda: F.linear(x, layer.weight.detach()), but=[layer]) == 0


def test_a_picture_of_four_times_the_area_keeps_more_and_one_computed_again_less(training):
    small, large = (blank_item(training.actors, (side, side)) for side in (64, 128))
    all_of_it = of_picture(training, small)
    assert all_of_it > 0
    assert 2 * all_of_it < of_picture(training, large) < 4 * all_of_it
    recompute(training.plain)
    training.objective.features.recompute = True
    assert of_picture(training, small) < 0.5 * all_of_it


def test_they_are_kept_where_there_is_room_and_only_there(training, caplog):
    caplog.set_level(logging.INFO)
    item = blank_item(training.actors, (64, 64))
    learnt = sum(one.numel() for learner in training.learners.values() for one in trainable(learner.plain).values())
    needed = training.config.batch * of_picture(training, item) + STATE * learnt
    settle(training, item, room=needed)
    assert spared(training) == [False] * 3
    settle(training, item, room=needed - 1)
    assert spared(training) == [True] * 3
    said = [record.getMessage() for record in caplog.records if "activations" in record.getMessage()]
    assert [line.partition(":")[0] for line in said] == ["activations are kept", "activations are computed again"]


def test_a_cpu_computes_them_again(config, tmp_path):
    chosen = config(tmp_path, critic=Critic(rank=2), student=Student(rank=4, gradient_checkpointing="auto"))
    made = make_training(chosen, make_accelerator(chosen, tmp_path), pipe=FAMILIES["sdxl"].tiny())
    assert room_of(made) == 0
    assert spared(made) == [True] * 3


def test_one_is_not_true():
    with pytest.raises(InputError, match=r"gradient_checkpointing is 1; it is one of True, False, auto"):
        from_dict({"output": "x", "stages": [{"batches": 1}], "student": {"gradient_checkpointing": 1}})
