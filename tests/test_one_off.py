"""A class for one object: what sees it, and what of it a copy takes along."""

import copy
import pickle

import pytest
from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel

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
