"""VACE's Split: scaled hints of the control blocks reach the blocks that take them."""

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from vivace.families import FAMILIES, wan_vace

WAN_VACE = FAMILIES["wan_vace"]


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return WanVACETransformer3DModel(**wan_vace.TINY).eval()


def small(transformer, **extra):
    return wan_vace.inputs(transformer, size=(64, 96), batch=2, frames=5, text_tokens=7) | extra


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 2.0])])
def test_scaled_hints(transformer, scale, assert_split_is_forward):
    kwargs = small(transformer, control_hidden_states_scale=scale)
    assert_split_is_forward(transformer, kwargs, family=WAN_VACE)
    silent = transformer(**kwargs | {"control_hidden_states_scale": torch.zeros(2)})[0]
    assert not torch.equal(transformer(**kwargs)[0], silent)


def test_bfloat16_and_a_shorter_control(transformer, assert_split_is_forward):
    transformer.to(torch.bfloat16)
    kwargs = small(transformer)
    kwargs["control_hidden_states"] = kwargs["control_hidden_states"][:, :, :1]
    assert_split_is_forward(transformer, kwargs, family=WAN_VACE)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_lora_strength(transformer, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "proj_in", "vace_patch_embedding"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=WAN_VACE)
    assert not torch.equal(transformer(**small(transformer))[0], transformer(**kwargs)[0])


def test_a_wrong_count_of_scales_is_refused(transformer):
    with pytest.raises(ValueError, match="has 3 values; pass 2"):
        wan_vace.split(transformer)(**small(transformer, control_hidden_states_scale=torch.ones(3)))
