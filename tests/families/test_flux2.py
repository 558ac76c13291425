"""FLUX.2's Split with references whose keys and values are kept from step to step, and LoRA strength."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

from vivace.families import FAMILIES, flux2

FLUX2 = FAMILIES["flux2"]


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return Flux2Transformer2DModel(**flux2.TINY).eval()


@pytest.fixture
def keeper(transformer):
    """The transformer with the processors that keep and use keys and values of references."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return transformer


def small(transformer, **extra):
    return flux2.inputs(transformer, size=(64, 96), batch=2, text_tokens=7) | extra


def test_references_are_extracted_as_the_forward_does(keeper, assert_split_is_forward):
    kwargs = small(keeper, kv_cache_mode="extract", num_ref_tokens=8, ref_fixed_timestep=0.1)
    assert_split_is_forward(keeper, kwargs, family=FLUX2)
    picture, kept = keeper(**kwargs)
    _, ours = flux2.split(keeper)(**kwargs)
    assert picture.shape[1] == 24 - 8
    assert ours.num_ref_tokens == kept.num_ref_tokens == 8
    layers = zip(
        [*ours.double_block_caches, *ours.single_block_caches],
        [*kept.double_block_caches, *kept.single_block_caches],
        strict=True,
    )
    for own, stock in layers:
        assert all(map(torch.equal, own.get(), stock.get()))


def test_kept_references_are_used_as_the_forward_does(keeper, assert_split_is_forward):
    _, kept = keeper(**small(keeper, kv_cache_mode="extract", num_ref_tokens=8))
    kwargs = small(keeper)
    cached = {"kv_cache": kept, "kv_cache_mode": "cached"}
    assert torch.equal(keeper(**kwargs | cached)[0], flux2.split(keeper)(**kwargs | cached)[0])
    assert not torch.equal(keeper(**kwargs)[0], keeper(**kwargs | cached)[0])
    assert_split_is_forward(keeper, kwargs, family=FLUX2)


def test_every_step_of_the_pipeline_that_keeps_references(quick):
    pipe = FLUX2.tiny("Flux2KleinKVPipeline")
    transformer, modes = pipe.transformer, []

    def compare(module, args, kwargs, output):
        modes.append(kwargs.get("kv_cache_mode"))
        assert torch.equal(flux2.split(module)(**kwargs)[0], output[0])

    transformer.register_forward_hook(compare, with_kwargs=True)
    quick(pipe)
    assert modes == ["extract", "cached"]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_strength(transformer, scale, assert_split_is_forward):
    from peft import LoraConfig

    targets = ["to_q", "to_qkv_mlp_proj", "x_embedder", "double_stream_modulation_img.linear", "proj_out"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    kwargs = small(transformer, joint_attention_kwargs={"scale": scale})
    assert_split_is_forward(transformer, kwargs, family=FLUX2)
    assert torch.equal(transformer(**small(transformer))[0], transformer(**kwargs)[0]) == (scale == 1.0)


def test_bfloat16_without_guidance(assert_split_is_forward):
    transformer = Flux2Transformer2DModel(**flux2.TINY, guidance_embeds=False).to(torch.bfloat16).eval()
    assert_split_is_forward(transformer, small(transformer), family=FLUX2)


@pytest.mark.parametrize(
    ("variant", "component", "count"),
    [
        ("dev", "text_encoder", 24_011_361_280),
        ("dev", "vae", 84_046_115),
        ("klein-4b", "text_encoder", 4_022_468_096),
        ("klein-9b", "text_encoder", 8_190_735_360),
    ],
)
def test_counts_of_the_other_components(variant, component, count):
    module = FLUX2.full(variant, component=component, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == count
