"""PixArt's Split with masks and with the size conditions of alpha."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from vivace.families import pixart


def transformer(**extra):
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**pixart.TINY, **extra}).eval()


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_sizes_with_and_without_conditions(conditions, size, assert_split_is_forward):
    # the embedders of size and aspect ratio split the width in three
    model = transformer(use_additional_conditions=conditions, num_attention_heads=3, cross_attention_dim=48)
    kwargs = pixart.inputs(model, size=size, text_tokens=5)
    assert (kwargs["added_cond_kwargs"]["resolution"] is not None) == conditions
    assert_split_is_forward(model, kwargs, family=pixart.PIXART)


@pytest.mark.parametrize("mask", [torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[[0.0, 0, -9, 0]]] * 2)])
def test_a_mask_and_a_bias_over_the_text(mask, assert_split_is_forward):
    model = transformer()
    kwargs = pixart.inputs(model, size=(64, 64), text_tokens=4) | {"encoder_attention_mask": mask}
    assert_split_is_forward(model, kwargs, family=pixart.PIXART)
    assert not torch.equal(model(**kwargs)[0], model(**kwargs | {"encoder_attention_mask": None})[0])


def test_no_caption_projection_and_attention_kwargs(assert_split_is_forward):
    model = transformer(caption_channels=None)
    kwargs = pixart.inputs(transformer(), size=(64, 64), text_tokens=4) | {"cross_attention_kwargs": {}}
    assert_split_is_forward(model, kwargs, family=pixart.PIXART)


def test_missing_conditions_are_named():
    model = transformer(use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=48)
    kwargs = pixart.inputs(model, size=(64, 64)) | {"added_cond_kwargs": None}
    with pytest.raises(ValueError, match="added_cond_kwargs"):
        pixart.split(model)(**kwargs)
