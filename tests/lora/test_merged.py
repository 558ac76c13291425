"""LoRA merged into the weights: exact to take out, flat over many swaps, views and pointers kept."""

import copy

import pytest
import torch

import vivace
from vivace import InputError
from vivace.accelerate import acceleration_of


def weights(pipe):
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_swaps_leave_memory_flat_and_the_output_of_a_fresh_load(sd3_pipe, sd3_latents, lora_of, dtype):
    sd3_pipe.to(dtype)
    fresh = copy.deepcopy(sd3_pipe)
    before = weights(sd3_pipe)
    vivace.accelerate(sd3_pipe, lora="merged")
    effect = acceleration_of(sd3_pipe).target.lanes["transformer"].adapters.effect
    held = []
    for swap in range(10):
        sd3_pipe.load_lora_weights(lora_of(fresh.transformer, seed=swap, rank=2 + swap), adapter_name=f"style{swap}")
        swapped = sd3_latents(sd3_pipe)
        held.append(effect.nbytes)
        sd3_pipe.unload_lora_weights()
    assert held == held[:1] * 10
    vivace.accelerate(fresh, lora="merged")
    fresh.load_lora_weights(lora_of(fresh.transformer, seed=9, rank=11))
    assert torch.equal(swapped, sd3_latents(fresh))
    vivace.restore(sd3_pipe)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(sd3_pipe).items())


def test_views_and_pointers_stay(sd3_pipe, sd3_latents, lora_of):
    vivace.accelerate(sd3_pipe)
    sd3_latents(sd3_pipe)
    split = acceleration_of(sd3_pipe).target.lanes["transformer"].split
    pointers = [parameter.data_ptr() for parameter in sd3_pipe.transformer.parameters()]
    sd3_pipe.load_lora_weights(lora_of(sd3_pipe.transformer), adapter_name="a")
    sd3_latents(sd3_pipe)
    sd3_pipe.set_adapters("a", 0.5)
    sd3_latents(sd3_pipe)
    assert acceleration_of(sd3_pipe).target.lanes["transformer"].split is split
    assert [parameter.data_ptr() for parameter in sd3_pipe.transformer.parameters()] == pointers
    assert vivace.report(sd3_pipe).calls["transformer"] == {"fused blocks": 9}


def test_the_strength_of_one_call_is_that_call_s(sd3_pipe, sd3_latents, lora_of):
    stock = copy.deepcopy(sd3_pipe)
    vivace.accelerate(sd3_pipe, lora="merged")
    for pipe in (sd3_pipe, stock):
        pipe.load_lora_weights(lora_of(stock.transformer), adapter_name="a")
    whole = sd3_latents(sd3_pipe)
    for strength in (0.25, 0.5):
        arguments = {"joint_attention_kwargs": {"scale": strength}}
        ours, theirs = (sd3_latents(pipe, **arguments) for pipe in (sd3_pipe, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(ours, whole, atol=1e-2)
    assert torch.equal(sd3_latents(sd3_pipe), whole)
    with pytest.raises(InputError, match="need lora='side'"):
        sd3_latents(sd3_pipe, joint_attention_kwargs={"scale": [0.2]})


def test_convolutions_and_biases(unet_pipe, lora_of):
    """A UNet, with LoRA on its convolutions and biases as LyCORIS and Wan's distilled files have them."""
    pipe = copy.deepcopy(unet_pipe)

    def noise(pipe):
        torch.manual_seed(0)
        with torch.no_grad():
            return pipe.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, pipe.unet.config.cross_attention_dim)).sample

    factors = lora_of(pipe.unet, prefix="unet", within="attn")
    name, first = next(
        (name, module) for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Conv2d)
    )
    factors[f"unet.{name}.lora_A.weight"] = torch.randn(4, *first.weight.shape[1:]) * 0.1
    factors[f"unet.{name}.lora_B.weight"] = torch.randn(first.weight.shape[0], 4, 1, 1) * 0.1
    plain = noise(pipe)
    stock = copy.deepcopy(pipe)
    stock.load_lora_weights(dict(factors))
    for mode in ("merged", "side"):
        fast = vivace.accelerate(copy.deepcopy(pipe), lora=mode)
        fast.load_lora_weights(dict(factors))
        torch.testing.assert_close(noise(fast), noise(stock), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(noise(fast), plain, atol=1e-2)
        fast.unload_lora_weights()
        torch.testing.assert_close(noise(fast), plain, rtol=1e-3, atol=1e-4)
        assert torch.equal(noise(vivace.restore(fast)), plain)


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("quant", ["off", "int8"])
def test_biases_on_some_layers_only(sd3_pipe, sd3_latents, lora_of, quant, mode):
    """Wan's distilled files have them; PEFT would leave the other layers' without values."""
    factors = lora_of(sd3_pipe.transformer, within="attn", std=0.05)
    ups = [key for key in factors if key.endswith("lora_B.weight")]
    shifts = {f"{key.removesuffix('weight')}bias": torch.ones(len(factors[key])) for key in ups[::2]}
    nothing = {f"{key.removesuffix('weight')}bias": torch.zeros(len(factors[key])) for key in ups}
    stock = copy.deepcopy(sd3_pipe)
    stock.load_lora_weights({**factors, **nothing, **shifts})
    wanted = sd3_latents(stock)
    vivace.accelerate(sd3_pipe, lora=mode, quant=quant)
    before = sd3_latents(sd3_pipe)
    sd3_pipe.load_lora_weights({**factors, **shifts})
    adapted = sd3_latents(sd3_pipe)
    assert (adapted - wanted).norm() < (1e-3 if quant == "off" else 0.2) * (wanted - before).norm()
    sd3_pipe.unload_lora_weights()
    assert torch.equal(sd3_latents(sd3_pipe), before)


def test_a_deep_copy_is_a_stock_pipeline_with_its_adapters(sd3_pipe, sd3_latents, lora_of):
    vivace.accelerate(sd3_pipe, lora="merged")
    sd3_pipe.load_lora_weights(lora_of(sd3_pipe.transformer), adapter_name="a")
    adapted = sd3_latents(sd3_pipe)
    copied = copy.deepcopy(sd3_pipe)
    assert copied.get_active_adapters() == ["a"]
    torch.testing.assert_close(sd3_latents(copied), adapted, rtol=1e-3, atol=1e-3)
    copied.unload_lora_weights()
    sd3_pipe.unload_lora_weights()
    vivace.restore(sd3_pipe)
    assert torch.equal(sd3_latents(copied), sd3_latents(sd3_pipe))
