"""FLUX.1's Split with control residuals, adapters, LoRA strength, and old position shapes."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from vivace.families import FAMILIES, flux

FLUX = FAMILIES["flux"]


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    config = {**flux.TINY, "num_layers": 5, "num_single_layers": 4}
    return FluxTransformer2DModel(**config).eval()


def small(transformer, **extra):
    return flux.inputs(transformer, size=(64, 96), batch=2, text_tokens=7) | extra


def residuals(transformer, count):
    return [torch.randn(2, 24, transformer.inner_dim) for _ in range(count)]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("double", "single"), [(5, 4), (2, 3), (3, 1), (1, 0), (0, 2)])
def test_control_residuals(transformer, double, single, repeat, assert_split_is_forward):
    control = {
        "controlnet_block_samples": residuals(transformer, double) or None,
        "controlnet_single_block_samples": residuals(transformer, single) or None,
        "controlnet_blocks_repeat": repeat,
    }
    kwargs = small(transformer)
    assert_split_is_forward(transformer, kwargs | control, family=FLUX)
    assert not torch.equal(transformer(**kwargs)[0], transformer(**kwargs | control)[0])


def test_ip_adapter_embeddings_stay_the_callers(transformer, assert_split_is_forward):
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    image = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.randn(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    keys = {}
    for index in range(len(transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            keys |= {f"{index}.{name}.weight": torch.randn(inner, width), f"{index}.{name}.bias": torch.randn(inner)}
    transformer._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}])
    attention = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    kwargs = small(transformer, joint_attention_kwargs=attention)
    assert_split_is_forward(transformer, kwargs, family=FLUX)
    flux.split(transformer)(**kwargs)
    assert list(attention) == ["ip_adapter_image_embeds"]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength(transformer, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "proj_mlp", "x_embedder", "context_embedder", "norm1.linear", "proj_out"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, joint_attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=FLUX)
    assert torch.equal(transformer(**small(transformer))[0], transformer(**kwargs)[0]) == (scale == 1.0)


def test_positions_with_a_batch_dimension(transformer, assert_split_is_forward):
    kwargs = small(transformer)
    ids = {name: kwargs[name][None].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    assert_split_is_forward(transformer, kwargs | ids, family=FLUX)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_without_guidance(dtype, assert_split_is_forward):
    transformer = FluxTransformer2DModel(**flux.TINY | {"guidance_embeds": False}).to(dtype).eval()
    kwargs = small(transformer)
    assert kwargs["guidance"] is None
    assert kwargs["hidden_states"].dtype == dtype
    assert_split_is_forward(transformer, kwargs, family=FLUX)


def test_inputs_have_the_published_shapes():
    transformer = FluxTransformer2DModel(**flux.TINY | {"in_channels": flux.FILL["in_channels"]})
    kwargs = flux.inputs(transformer, size=(1024, 512))
    assert kwargs["hidden_states"].shape == (1, 64 * 32, 384)
    assert kwargs["encoder_hidden_states"].shape[1] == 512
    assert kwargs["img_ids"].shape == (64 * 32, 3)
    assert kwargs["img_ids"].amax(0).tolist() == [0, 31, 63]


@pytest.mark.parametrize(
    ("component", "count"),
    [("vae", 83_819_683), ("text_encoder", 123_060_480), ("text_encoder_2", 4_762_310_656)],
)
def test_counts_of_the_other_components(component, count):
    module = FLUX.full(component=component, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == count
