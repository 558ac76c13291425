"""A model written with its LoRAs merged: the same pictures without them, and nothing that was there is lost."""

import pytest
import torch
from safetensors.torch import save_file

import vivace
from vivace import InputError, checkpoint
from vivace.families import FAMILIES
from vivace.generation.job import Lora
from vivace.load import DTYPES
from vivace.lora.merge import merge


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    room = tmp_path_factory.mktemp("room")
    FAMILIES["sd3"].tiny().save_pretrained(room / "sd3")
    FAMILIES["sd3"].tiny().to(torch.bfloat16).save_pretrained(room / "half")
    FAMILIES["svd"].tiny().save_pretrained(room / "svd")
    return room


@pytest.fixture
def loras(room, lora_of, tmp_path):
    """Two files, one of which also changes a text encoder."""
    pipe = vivace.load(room / "sd3", device="cpu")
    first = lora_of(pipe.transformer, seed=1)
    first |= lora_of(pipe.text_encoder, prefix="text_encoder", within="q_proj", seed=2)
    save_file(first, tmp_path / "first.safetensors")
    save_file(lora_of(pipe.transformer, seed=3, rank=2), tmp_path / "second.safetensors")
    return [Lora(path=tmp_path / "first.safetensors", weight=0.7), Lora(path=tmp_path / "second.safetensors")]


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("a fox", num_inference_steps=2, generator=generator, height=64, width=64, output_type="pt").images


def test_the_picture_of_the_adapted_model(room, loras, tmp_path):
    adapted = vivace.load(room / "sd3", device="cpu")
    plain = picture(adapted)
    for index, one in enumerate(loras):
        adapted.load_lora_weights(str(one.path), adapter_name=f"l{index}")
    adapted.set_adapters(["l0", "l1"], [0.7, 1.0])
    wanted = picture(adapted)
    folder = merge(room / "sd3", loras, output=tmp_path / "out")
    merged = vivace.load(folder, device="cpu")
    torch.testing.assert_close(picture(merged), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    assert not merged.get_active_adapters()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "first.safetensors", "second.safetensors"}


def test_stored_as_it_was_or_as_asked(room, loras, tmp_path):
    for name, wanted in ((None, "BF16"), ("float32", "F32")):
        folder = merge(room / "half", loras, output=tmp_path / wanted, dtype=name)
        file = next((folder / "transformer").glob("*.safetensors"))
        assert {tensor.dtype for tensor in checkpoint.header(file).values()} == {wanted}
    assert "float32" in DTYPES


def test_an_existing_folder_is_left_alone(room, loras, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="is left alone"):
        merge(room / "sd3", loras, output=tmp_path / "out")
    with pytest.raises(InputError, match="no LoRA to merge"):
        merge(room / "sd3", [], output=tmp_path / "new")


def test_what_fails_leaves_nothing(room, loras, lora_of, tmp_path):
    other = lora_of(torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 3)}), prefix="transformer")
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="none of its layers is there"):
        merge(room / "sd3", [Lora(path=tmp_path / "other.safetensors")], output=tmp_path / "out")
    with pytest.raises(InputError, match="no weight file"):
        merge(room / "sd3", [Lora(path=tmp_path / "absent.safetensors")], output=tmp_path / "out")
    with pytest.raises(InputError, match="takes no LoRA"):
        merge(room / "svd", loras, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {
        "first.safetensors",
        "other.safetensors",
        "second.safetensors",
    }


def test_where_nothing_can_be_written_is_said_before_the_model_is_read(room, loras, monkeypatch):
    monkeypatch.setattr("vivace.lora.merge.load_source", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(InputError, match=r"out cannot be written: .*name a folder elsewhere"):
        merge(room / "sd3", loras, output=loras[0].path / "out")
