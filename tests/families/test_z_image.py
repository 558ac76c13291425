"""Z-Image's Split on samples of different size and length, with control residuals; nested pictures are refused."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from vivace.families import FAMILIES, z_image
from vivace.families.tiny import without_zeros

Z_IMAGE = FAMILIES["z_image"]


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return without_zeros(ZImageTransformer2DModel(**z_image.TINY)).eval()


def small(transformer, **extra):
    return z_image.inputs(transformer, size=(64, 96), batch=2, text_tokens=7) | extra


def test_samples_of_different_size_and_length(transformer, assert_split_is_forward):
    kwargs = small(
        transformer,
        x=[torch.randn(16, 1, 8, 12), torch.randn(16, 1, 16, 24)],
        cap_feats=[torch.randn(40, 32), torch.randn(5, 32)],
        t=torch.tensor([0.2, 0.9]),
    )
    assert_split_is_forward(transformer, kwargs, family=Z_IMAGE)


def test_control_residuals_of_some_layers(transformer, assert_split_is_forward):
    kwargs = small(transformer)
    state = z_image.split(transformer).prologue(**kwargs)
    control = {"controlnet_block_samples": {1: torch.randn_like(state.x)}}
    assert_split_is_forward(transformer, kwargs | control, family=Z_IMAGE)
    assert not torch.equal(transformer(**kwargs)[0][0], transformer(**kwargs | control)[0][0])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength(transformer, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "w1", "cap_embedder.1"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, joint_attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=Z_IMAGE)
    assert torch.equal(transformer(**small(transformer))[0][0], transformer(**kwargs)[0][0]) == (scale == 1.0)


def test_bfloat16(transformer, assert_split_is_forward):
    transformer.to(torch.bfloat16)
    assert_split_is_forward(transformer, small(transformer), family=Z_IMAGE)


def test_nested_pictures_are_refused(transformer):
    with pytest.raises(ValueError, match="Omni"):
        z_image.split(transformer)(**small(transformer, x=[[torch.randn(16, 1, 8, 8)]]))
