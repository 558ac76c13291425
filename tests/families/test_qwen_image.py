"""Qwen-Image's Split with masks, control residuals, pictures to edit and LoRA strength."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from vivace.families import FAMILIES, qwen_image

QWEN_IMAGE = FAMILIES["qwen_image"]


def transformer_of(**extra):
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**{**qwen_image.TINY, "num_layers": 5} | extra).eval()


@pytest.fixture
def transformer():
    return transformer_of()


def small(transformer, **extra):
    return qwen_image.inputs(transformer, size=(64, 96), batch=2, text_tokens=7) | extra


def test_masked_words(transformer, assert_split_is_forward):
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    kwargs = small(transformer)
    assert_split_is_forward(transformer, kwargs | {"encoder_hidden_states_mask": mask}, family=QWEN_IMAGE)
    masked = transformer(**kwargs, encoder_hidden_states_mask=mask)[0]
    assert not torch.equal(transformer(**kwargs)[0][1], masked[1])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_control_residuals(transformer, count, assert_split_is_forward):
    control = {"controlnet_block_samples": [torch.randn(2, 24, transformer.inner_dim) for _ in range(count)]}
    kwargs = small(transformer)
    assert_split_is_forward(transformer, kwargs | control, family=QWEN_IMAGE)
    assert not torch.equal(transformer(**kwargs)[0], transformer(**kwargs | control)[0])


@pytest.mark.parametrize("still", [False, True])
def test_pictures_to_edit(still, assert_split_is_forward):
    transformer = transformer_of(zero_cond_t=still)
    kwargs = small(
        transformer,
        hidden_states=torch.randn(2, 24 + 6 + 4, 64),
        img_shapes=[[(1, 6, 4), (1, 2, 3), (1, 2, 2)]] * 2,
    )
    assert_split_is_forward(transformer, kwargs, family=QWEN_IMAGE)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength(transformer, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "img_in", "txt_in", "img_mod.1", "proj_out"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=QWEN_IMAGE)
    assert torch.equal(transformer(**small(transformer))[0], transformer(**kwargs)[0]) == (scale == 1.0)


def test_two_calls_under_true_guidance(seen):
    _, calls = seen(QWEN_IMAGE.tiny(), negative_prompt="blurry", true_cfg_scale=4.0)
    assert len(calls) == 2 * 2


def test_bfloat16(transformer, assert_split_is_forward):
    transformer.to(torch.bfloat16)
    assert_split_is_forward(transformer, small(transformer), family=QWEN_IMAGE)


@pytest.mark.parametrize(("component", "count"), [("vae", 126_892_531), ("text_encoder", 8_292_166_656)])
def test_counts_of_the_other_components(component, count):
    module = QWEN_IMAGE.full(component=component, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == count
