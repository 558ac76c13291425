"""`load`: a stock pipeline from a folder, and what is known of it before its weights are read."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import vivace
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.load import find


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd3"
    pipe = FAMILIES["sd3"].tiny()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(folder)
    return folder


def test_a_folder_becomes_its_own_stock_class(folder):
    pipe = vivace.load(folder, dtype="bf16", device="cpu")
    assert type(pipe) is StableDiffusion3Pipeline
    assert (pipe.text_encoder_3, pipe.dtype, pipe.device.type) == (None, torch.bfloat16, "cpu")
    assert vivace.load(str(folder), device="cpu").dtype == torch.float32


def test_a_folder_says_what_it_was_made_for(folder):
    assert (find(folder).defaults, find(folder).size) == ({}, None)
    (folder / "vivace.json").write_text(json.dumps({"steps": 28, "guidance": 3.0, "size": [256, 256]}))
    assert (find(folder).defaults, find(folder).size) == ({"steps": 28, "guidance": 3.0}, (256, 256))
    (folder / "vivace.json").unlink()


def test_a_published_model_is_told_by_its_denoiser(folder, tmp_path):
    family = FAMILIES["sd3"]
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    for name, variant in family.variants.items():
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(dict(variant.denoiser)))
        source = find(tmp_path)
        assert source.variant is not None, name
        assert source.variant.denoiser == variant.denoiser
        assert source.defaults["steps"] == source.variant.steps


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"_class_name": 3}'])
def test_a_folder_that_is_no_pipeline(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(InputError, match="is not a pipeline folder"):
        vivace.load(tmp_path)


def test_a_pipeline_over_another_familys_denoiser(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    for name in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(InputError, match=r"SD3Transformer2DModel, a model of sd3, .* runs a FluxTransformer2DModel"):
        vivace.load(tmp_path)


def test_a_class_that_diffusers_lacks(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NewestPipeline"}')
    with pytest.raises(InputError, match=r"is a NewestPipeline, which this diffusers \(.*\) lacks"):
        vivace.load(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DModel", "utils", "ModularPipeline"])
def test_a_class_that_is_no_pipeline(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(InputError, match=f"names {name} as its pipeline, which is none"):
        vivace.load(tmp_path)


@pytest.mark.parametrize("values", [{"longest": "x"}, {"steps": 0}, {"steps": 2.5}, {"size": [256]}, {"guidance": -1}])
def test_a_models_own_file_with_odd_values(folder, values):
    own = folder / "vivace.json"
    own.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"vivace.json: {next(iter(values))} is .*; it has to be "):
        find(folder)
    own.unlink()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("transformer/config.json", '{"num_layers": "many"}'),  # TypeError
        ("text_encoder/config.json", '{"hidden_size": 7}'),  # an error of transformers' own
        ("text_encoder/config.json", "{}"),  # RuntimeError
        ("tokenizer/tokenizer.json", "{}"),  # KeyError
    ],
)
def test_whatever_the_libraries_raise_is_one_line(folder, file, text):
    path = folder / file
    before = path.read_bytes()
    path.write_text(text)
    try:
        with pytest.raises(InputError, match=r"cannot be loaded as StableDiffusion3Pipeline: .") as error:
            vivace.load(folder, device="cpu")
        assert len(str(error.value).splitlines()) == 1
    finally:
        path.write_bytes(before)
