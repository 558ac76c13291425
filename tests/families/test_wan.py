"""Wan's Split with picture embeddings and times of their own; the two experts; inputs at both autoencoders' shapes."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from vivace.families import FAMILIES, wan

WAN = FAMILIES["wan"]


def transformer_of(config=wan.TINY, **extra):
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**config, **extra}).eval()


def small(transformer, **extra):
    return wan.inputs(transformer, size=(64, 96), batch=2, frames=5, text_tokens=7) | extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [wan.TINY, wan.TINY_CLIP])
def test_with_and_without_picture_embeddings(config, dtype, assert_split_is_forward):
    transformer = transformer_of(config).to(dtype)
    kwargs = small(transformer)
    assert (kwargs["encoder_hidden_states_image"] is not None) == (config is wan.TINY_CLIP)
    assert_split_is_forward(transformer, kwargs, family=WAN)


def test_a_time_for_each_position(assert_split_is_forward):
    transformer = transformer_of(in_channels=48, out_channels=48)
    kwargs = wan.inputs(transformer, size=(64, 96), batch=2, frames=5, text_tokens=7)
    assert kwargs["hidden_states"].shape == (2, 48, 2, 6, 4)
    assert kwargs["timestep"].shape == (2, 2 * 3 * 2)
    kwargs["timestep"] = 1000 * torch.rand_like(kwargs["timestep"])
    assert_split_is_forward(transformer, kwargs, family=WAN)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength(scale, assert_split_is_forward):
    from peft import LoraConfig

    transformer = transformer_of()
    targets = ["to_q", "time_proj", "proj_out"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=WAN)
    assert torch.equal(transformer(**small(transformer))[0], transformer(**kwargs)[0]) == (scale == 1.0)


def test_both_experts_are_called_in_turn(seen):
    pipe = WAN.tiny("WanPipeline")
    _, calls = seen(pipe, num_inference_steps=4)
    order = [denoiser is pipe.transformer for denoiser, _ in calls]
    assert order == sorted(order, reverse=True)
    assert 0 < sum(order) < len(order)


def test_inputs_refuse_a_count_of_frames_that_cannot_be_packed():
    with pytest.raises(ValueError, match="got 80; pass 81"):
        wan.inputs(transformer_of(), frames=80)


@pytest.mark.parametrize(
    ("variant", "component", "count"),
    [
        (None, "text_encoder", 5_680_910_336),
        (None, "vae", 126_892_531),
        ("2.2-ti2v-5b", "vae", 704_688_668),
        ("2.1-i2v-14b-480p", "image_encoder", 630_766_080),
    ],
)
def test_counts_of_the_other_components(variant, component, count):
    module = WAN.full(variant, component=component, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == count
