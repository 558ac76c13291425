"""One-file checkpoints in their original layout, made here by renaming small random pipelines."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vivace
from vivace import single_file
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.families.tiny import autoencoder_kl
from vivace.family import Variant
from vivace.load import find

spec = importlib.util.spec_from_file_location("original_layout", Path(__file__).with_name("original_layout.py"))
layout = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}
# Files are told apart by a tensor of the tenth layer.
OPEN_TEXT = TEXT | {"hidden_size": 48, "num_hidden_layers": 11, "projection_dim": 48, "hidden_act": "gelu"}
UNET = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": 2}
SMALL = {
    "sd": Variant(
        denoiser=UNET | {"block_out_channels": (16, 16, 32, 32), "cross_attention_dim": 32},
        text_encoders={"text_encoder": ("CLIPTextModel", TEXT)},
        hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        size=(64, 64),
        steps=2,
    ),
    "sdxl": Variant(
        denoiser=dict(FAMILIES["sdxl"].variants["base"].denoiser)
        | UNET
        | {"block_out_channels": (16, 32, 32), "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 80}
        | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 48},
        text_encoders={
            "text_encoder": ("CLIPTextModel", TEXT),
            "text_encoder_2": ("CLIPTextModelWithProjection", OPEN_TEXT),
        },
        hub_id="stabilityai/stable-diffusion-xl-base-1.0",
        size=(64, 64),
        steps=2,
    ),
}


@pytest.fixture(params=["sd", "sdxl"])
def family(request, monkeypatch):
    """The family with one small variant that has the published model's layout and id."""
    small = SMALL[request.param]
    vae = dict(autoencoder_kl().config) | {"scaling_factor": FAMILIES[request.param].vae.get("scaling_factor", 0.18215)}
    small = dataclasses.replace(small, vae={key: value for key, value in vae.items() if not key.startswith("_")})
    family = dataclasses.replace(FAMILIES[request.param], variants={"small": small, "twin": small})
    monkeypatch.setitem(FAMILIES, request.param, family)
    return family


def parts_of(family):
    torch.manual_seed(0)
    slots = ["denoiser", "vae", *family.variant().text_encoders]
    parts = {slot: family.full(component=slot, device="cpu", dtype=torch.float32) for slot in slots}
    for module in parts.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    return parts


def original(parts):
    found = layout.unet(parts["denoiser"].state_dict(), layers=2) | layout.vae(parts["vae"].state_dict())
    if "text_encoder_2" in parts:
        found |= layout.clip(parts["text_encoder"].state_dict(), start="conditioner.embedders.0")
        found |= layout.open_clip(parts["text_encoder_2"].state_dict(), start="conditioner.embedders.1")
    else:
        found |= layout.clip(parts["text_encoder"].state_dict(), start="cond_stage_model")
    return {name: weight.contiguous() for name, weight in found.items()}


def test_a_file_alone_becomes_a_pipeline_without_a_network(family, tmp_path):
    parts = parts_of(family)
    save_file(original(parts), tmp_path / "model.safetensors")
    source = find(tmp_path / "model.safetensors")
    assert (source.family, source.variant, source.pipeline) == (family, family.variant(), family.pipelines[0])
    pipe = vivace.load(tmp_path / "model.safetensors", device="cpu", dtype="float32")
    assert type(pipe).__name__ == family.pipelines[0]
    assert type(pipe.scheduler).__name__ == family.scheduler[0]
    for slot, part in parts.items():
        loaded = getattr(pipe, "unet" if slot == "denoiser" else slot).state_dict()
        for name, weight in part.state_dict().items():
            if weight.is_floating_point():
                torch.testing.assert_close(loaded[name], weight, msg=lambda text, name=name: f"{name}: {text}")
    picture = pipe("a red circle", num_inference_steps=1, width=64, height=64).images[0]
    assert picture.size == (64, 64)


def test_variant_names_one_of_those_that_look_alike(family, tmp_path):
    save_file(original(parts_of(family)), tmp_path / "model.safetensors")
    assert find(tmp_path / "model.safetensors", variant="twin").variant is family.variants["twin"]
    with pytest.raises(InputError, match=r"has no variant 'fp16'; it has small, twin"):
        find(tmp_path / "model.safetensors", variant="fp16")


def test_weights_that_are_nowhere(family, tmp_path):
    lacking = {name: weight for name, weight in original(parts_of(family)).items() if "first_stage" not in name}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks weights of its vae; put it into a diffusers folder of "):
        vivace.load(tmp_path / "model.safetensors", device="cpu")


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_a_file_inside_a_diffusers_folder_takes_the_rest_from_there(family, tmp_path):
    tiny = family.tiny()
    tiny.save_pretrained(tmp_path)
    denoiser = parts_of(family)["denoiser"]
    denoiser.save_config(tmp_path / "unet")
    save_file(layout.unet(denoiser.state_dict(), layers=2), tmp_path / "unet_only.safetensors")
    pipe = vivace.load(tmp_path / "unet_only.safetensors", device="cpu", dtype="float32")
    torch.testing.assert_close(dict(pipe.unet.state_dict()), dict(denoiser.state_dict()))
    torch.testing.assert_close(dict(pipe.vae.state_dict()), dict(tiny.vae.state_dict()))
    assert len(pipe.tokenizer) == len(tiny.tokenizer)


def test_flux_is_a_denoiser_whose_rest_lies_around_it(tmp_path):
    """diffusers converts FLUX at its true width only, so here two blocks of zeros stand for all."""
    tiny = FAMILIES["flux"].tiny()
    tiny.save_pretrained(tmp_path)
    facts = dict(FAMILIES["flux"].variants["dev"].denoiser) | {"num_layers": 1, "num_single_layers": 1}
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", **facts})
    )
    sparse(tmp_path / "flux1-dev.safetensors", layout.flux_shapes())
    pipe = vivace.load(tmp_path / "flux1-dev.safetensors", device="cpu", dtype="bfloat16")
    assert type(pipe).__name__ == "FluxPipeline"
    assert (len(pipe.transformer.transformer_blocks), pipe.transformer.config["guidance_embeds"]) == (1, True)
    torch.testing.assert_close(
        dict(pipe.text_encoder_2.state_dict()), dict(tiny.to(torch.bfloat16).text_encoder_2.state_dict())
    )
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(
        InputError, match=r"no tokenizer for its T5EncoderModel; put it into a diffusers folder of black-forest"
    ):
        vivace.load(tmp_path / "flux1-dev.safetensors", device="cpu")


def sparse(path, shapes):
    """A safetensors file of bfloat16 zeros that takes no room on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_the_clip_tokenizer_is_the_published_one():
    tokenizer = single_file.clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert single_file.clip_tokenizer(pad="!")("a", padding="max_length").input_ids[-1] == 0
