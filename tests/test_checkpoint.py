"""Headers of weight files: what is read, and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from vivace import checkpoint
from vivace.errors import InputError


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    return path


def test_header_names_every_tensor(good):
    assert checkpoint.header(good) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


@pytest.mark.parametrize("kept", [0, 4, 9, 60, -1])
def test_a_cut_file_is_refused(good, kept):
    good.write_bytes(good.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"truncated|cut short"):
        checkpoint.header(good)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "disguised.safetensors"])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_under_any_name(tmp_path, name, save):
    save({"a": 1}, tmp_path / name)
    with pytest.raises(InputError, match=r"pickle.*can run any code"):
        checkpoint.header(tmp_path / name)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"not json at all, no." + b"x" * 50)
    with pytest.raises(InputError, match="not a safetensors file"):
        checkpoint.header(path)


def test_a_folder_needs_every_component_whole(tmp_path, good):
    (tmp_path / "unet").mkdir()
    with pytest.raises(InputError, match="lists 'vae', which is missing"):
        checkpoint.check_folder(tmp_path, components=["unet", "vae"])
    (tmp_path / "unet" / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="pickle"):
        checkpoint.check_folder(tmp_path, components=["unet"])
    (tmp_path / "unet" / "model.safetensors").write_bytes(good.read_bytes())
    with pytest.raises(InputError, match=r"unet is not complete: it has no config\.json"):
        checkpoint.check_folder(tmp_path, components=["unet"])
    (tmp_path / "unet" / "config.json").write_text("{}")
    checkpoint.check_folder(tmp_path, components=["unet"])


def test_a_tokenizer_needs_its_settings_and_its_words(tmp_path):
    room = tmp_path / "tokenizer_2"
    room.mkdir()
    with pytest.raises(InputError, match=r"has no tokenizer_config\.json"):
        checkpoint.check_folder(tmp_path, components=["tokenizer_2"])
    (room / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no tokenizer\.json or vocab\.json or "):
        checkpoint.check_folder(tmp_path, components=["tokenizer_2"])
    (room / "spiece.model").write_bytes(b"")
    checkpoint.check_folder(tmp_path, components=["tokenizer_2"])
