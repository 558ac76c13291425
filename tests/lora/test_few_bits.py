"""A model that came in few bits, from `vivace quantize`: adapters act beside its layers."""

import pytest
import torch
from safetensors.torch import save_file

import vivace
from vivace import Config, InputError
from vivace.families import FAMILIES
from vivace.generation.generate import generate
from vivace.generation.job import Job, Lora
from vivace.lora import files
from vivace.lora.merge import merge
from vivace.quant import folder


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A tiny SD3, quantised and written."""
    room = tmp_path_factory.mktemp("room") / "model"
    pipe = FAMILIES["sd3"].tiny()
    vivace.accelerate(pipe, quant="int8", keep_base="no", fuse="off")
    folder.write(pipe, room, denoisers={"transformer": pipe.transformer})
    return room


@pytest.fixture
def loras(lora_of, tmp_path):
    for seed in (1, 2):
        save_file(lora_of(FAMILIES["sd3"].tiny().transformer, seed=seed), tmp_path / f"{seed}.safetensors")
    return [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]


def noise(pipe):
    inputs = FAMILIES["sd3"].inputs(pipe.transformer, size=(64, 64), batch=2, frames=1, text_tokens=8, seed=0)
    with torch.no_grad():
        return pipe.transformer(**inputs)[0]


def test_as_beside_layers_that_were_quantised_here(room, loras):
    wanted = FAMILIES["sd3"].tiny()
    vivace.accelerate(wanted, quant="int8", keep_base="no", lora="side")
    pipe = vivace.accelerate(vivace.load(room, device="cpu"))
    plain = noise(pipe)
    assert torch.equal(plain, noise(wanted))
    for number, path in enumerate(loras):
        for one in (pipe, wanted):
            one.load_lora_weights(path, adapter_name=f"style{number}")
            one.set_adapters([f"style{n}" for n in range(number + 1)], [0.5, 0.8][: number + 1])
        adapted = noise(wanted)
        assert torch.equal(noise(pipe), adapted)
        assert not torch.allclose(adapted, plain, atol=1e-2)
    assert "beside the linears: its layers came in few bits" in str(vivace.report(pipe))
    vivace.accelerate(pipe, channels_last="off")
    assert torch.equal(noise(pipe), adapted)
    vivace.restore(pipe)
    torch.testing.assert_close(noise(pipe), adapted, rtol=1e-3, atol=1e-3)
    vivace.accelerate(pipe)
    torch.testing.assert_close(noise(pipe), adapted, rtol=1e-3, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(noise(pipe), plain)
    vivace.restore(pipe)
    torch.testing.assert_close(noise(pipe), plain, rtol=1e-3, atol=1e-3)


def test_auto_goes_beside_where_originals_are_not_kept(loras):
    pipe = vivace.accelerate(FAMILIES["sd3"].tiny(), quant="int8", keep_base="no")
    plain = noise(pipe)
    pipe.load_lora_weights(loras[0])
    assert not torch.allclose(noise(pipe), plain, atol=1e-2)
    assert "beside the linears: the 16-bit weights are not kept" in str(vivace.report(pipe))


def test_what_is_refused(room, loras, tmp_path):
    pipe = vivace.load(room, device="cpu")
    with pytest.raises(InputError, match=r"is in int8.*; vivace.accelerate the pipeline first"):
        files.load(pipe, loras[0])
    with pytest.raises(InputError, match="lora='merged' cannot be done here: its layers came in few bits; lora='side'"):
        vivace.accelerate(pipe, lora="merged")
    with pytest.raises(InputError, match="or take the 16-bit model"):
        merge(room, [Lora(path=loras[0])], output=tmp_path / "out")


@pytest.mark.parametrize("config", [None, Config(cache="off")])
def test_on_the_way_of_a_picture(room, loras, tmp_path, config):
    call = {"model": str(room), "size": (64, 64), "steps": 2, "config": config, "device": "cpu", "seed": 1}
    plain, styled = tmp_path / "plain.png", tmp_path / "styled.png"
    for path, added in ((plain, ()), (styled, (Lora(path=loras[0]),))):
        generate(Job(prompts=("a fox",), loras=added, output=path, **call))
    assert plain.read_bytes() != styled.read_bytes()
