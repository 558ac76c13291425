"""A class for one object: what sees it, and what of it a copy takes along."""

import copy
import itertools
import pickle

import pytest
from diffusers import (
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLImg2ImgPipeline,
)

import vivace
from vivace.families import FAMILIES
from vivace.one_off import give_class


class Plain:
    def __init__(self):
        self.value = 3

    def doubled(self):
        return 2 * self.value


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_stock_however_many_classes_there_were(copied):
    subject = Plain()
    undos = [give_class(subject, {"doubled": lambda self: 7}), give_class(subject, {"more": 1})]
    assert (subject.doubled(), type(subject).__qualname__) == (7, "Plain")
    assert type(copied(subject)) is Plain
    assert copied(subject).doubled() == 6
    for undo in reversed(undos):
        undo()
    assert type(subject) is Plain


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_undone_in_any_order_nothing_is_left(order):
    subject = Plain()
    undos = [give_class(subject, {"doubled": lambda self, n=n: n}) for n in range(3)]
    for number, left in zip(order, ({0, 1, 2} - {*order[:n]} for n in (1, 2, 3)), strict=True):
        undos[number]()
        assert subject.doubled() == (max(left) if left else 6)
    assert type(subject) is Plain


def test_two_pipelines_that_share_parts_are_restored_in_any_order():
    """As a base model and its refiner do."""
    for first in (0, 1):
        base = FAMILIES["sdxl"].tiny()
        refiner = StableDiffusionXLImg2ImgPipeline(**{**base.components, "unet": copy.deepcopy(base.unet)})
        pair = [vivace.accelerate(base), vivace.accelerate(refiner)]
        vivace.restore(pair[first])
        vivace.restore(pair[1 - first])
        assert [n for n, m in base.vae.named_modules() if hasattr(type(m), "vivace_stock")] == []
        assert type(base.scheduler).__mro__[0].__dict__.get("vivace_stock") is None
        vivace.accelerate(base, encoders="int8_weights")
        with pytest.raises(vivace.InputError, match="text_encoder is in few bits already, through another pipeline"):
            vivace.accelerate(refiner, encoders="int8_weights")


def test_a_pipeline_with_encoders_is_copied_and_taken_over_as_a_stock_one_is():
    pipe = FAMILIES["flux"].tiny()
    vivace.accelerate(pipe)
    for one in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(one) is FluxPipeline
        assert type(one.vae.decoder) is type(FAMILIES["flux"].tiny().vae.decoder)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert type(pipe.transformer) == FluxTransformer2DModel  # noqa: E721
    assert {type(pipe.transformer)} == {FluxTransformer2DModel}
    vivace.restore(pipe)
    assert type(other.transformer) is FluxTransformer2DModel
