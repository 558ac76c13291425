"""Random components at true shape: tables computed, weights of a sane scale, ties and 32-bit layers kept."""

from dataclasses import replace

import pytest
import torch

from vivace.families import FAMILIES, pixart, sd
from vivace.families.build import full_component
from vivace.family import Variant

PIXART = FAMILIES["pixart"]
SMALL_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
SMALL = replace(
    PIXART,
    variants={"small": Variant(denoiser=pixart.TINY)},
    text_encoders={"text_encoder": ("T5EncoderModel", {**SMALL_T5, "feed_forward_proj": "gated-gelu"})},
)


def test_position_tables_are_what_the_constructor_computes():
    from diffusers import PixArtTransformer2DModel

    built = SMALL.full(device="cpu", dtype=torch.float32)
    assert torch.equal(built.pos_embed.pos_embed, PixArtTransformer2DModel(**pixart.TINY).pos_embed.pos_embed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "config"), [("pixart", pixart.TINY), ("sd", sd.TINY)])
def test_activations_keep_their_scale(family, config, dtype):
    family = replace(FAMILIES[family], variants={"small": Variant(denoiser=config)})
    denoiser = family.full(device="cpu", dtype=dtype)
    assert denoiser.dtype == dtype
    assert not denoiser.training
    out = denoiser(**family.inputs(denoiser, size=(64, 64)))[0]
    assert 0.05 < out.float().std() < 20


def test_the_same_weights_every_time_in_bfloat16_by_default():
    first, second = SMALL.full(device="cpu"), SMALL.full(device="cpu")
    assert first.dtype == torch.bfloat16
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_a_text_encoder_keeps_its_tie_and_its_32_bit_layers():
    encoder = SMALL.full(component="text_encoder", device="cpu", dtype=torch.float16)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert encoder.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float16
    assert torch.isfinite(encoder(torch.arange(8)[None]).last_hidden_state).all()


def test_norms_pass_their_input_through():
    unet = full_component(FAMILIES["sd"], Variant(denoiser=sd.TINY), "unet", device="cpu", dtype=torch.float32)
    assert (unet.conv_norm_out.weight == 1).all()
    assert not unet.conv_norm_out.bias.any()
    assert unet.conv_out.weight.std() > 0


@pytest.mark.parametrize(
    ("family", "variant", "component", "count"),
    [
        ("sd", "1.5", "vae", 83_653_863),
        ("sd", "1.5", "text_encoder", 123_060_480),
        ("sd", "2.1", "text_encoder", 340_387_840),
        ("sdxl", "base", "text_encoder_2", 694_659_840),
        ("svd", "xt", "vae", 97_742_847),
        ("svd", "xt", "image_encoder", 632_076_800),
        ("pixart", "sigma", "text_encoder", 4_762_310_656),
    ],
)
def test_counts_of_published_components_without_storage(family, variant, component, count):
    model = FAMILIES[family].full(variant, component=component, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_text_encoder_is_as_wide_as_from_its_files(dtype, expected, tmp_path):
    """T5 keeps one of its matrices in 32 bit beside float16, and none beside bfloat16: as transformers loads it."""
    from transformers import T5EncoderModel

    tiny = FAMILIES["flux"].tiny().text_encoder_2
    tiny.save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    full = FAMILIES["flux"].full(component="text_encoder_2", device="meta", dtype=dtype)
    for model in (loaded, full):
        assert model.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").dtype == expected
