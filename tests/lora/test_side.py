"""LoRA beside the linears: strengths per call and per request, storage kept from adapter to adapter."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vivace
from vivace import InputError
from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.fused import FUSED
from vivace.lora.side import side_of


def call(pipe, **arguments):
    """One guided denoiser call for two requests: four samples, the unconditional ones first."""
    generator = torch.Generator().manual_seed(2)
    draw = [
        torch.randn(2, *shape, generator=generator).repeat(2, *[1] * len(shape))
        for shape in ((4, 8, 8), (9, 24), (20,))
    ]
    with torch.no_grad():
        return pipe.transformer(*draw, torch.full((4,), 500.0), return_dict=False, **arguments)[0]


def test_every_request_of_a_batch_has_its_strengths(sd3_pipe, lora_of):
    files = {name: lora_of(sd3_pipe.transformer, seed=seed) for seed, name in enumerate("ab")}
    vivace.accelerate(sd3_pipe, lora="side")
    for name, file in files.items():
        sd3_pipe.load_lora_weights(file, adapter_name=name)
    sd3_pipe.set_adapters(["a", "b"], [1.0, 0.5])
    alone = [call(sd3_pipe, joint_attention_kwargs={"scale": [one, one]}) for one in (0.3, {"a": 0.0})]
    mixed = call(sd3_pipe, joint_attention_kwargs={"scale": [0.3, {"a": 0.0}]})
    torch.testing.assert_close(mixed[0::2], alone[0][0::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1::2], alone[1][1::2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    torch.testing.assert_close(
        call(sd3_pipe, joint_attention_kwargs={"scale": [0.3, 0.3]}),
        call(sd3_pipe, joint_attention_kwargs={"scale": 0.3}),
        rtol=1e-4,
        atol=1e-4,
    )
    with pytest.raises(InputError, match="3 LoRA strengths do not fit a batch of 4"):
        call(sd3_pipe, joint_attention_kwargs={"scale": [0.3] * 3})


def test_storage_stays_from_adapter_to_adapter(sd3_pipe, sd3_latents, lora_of):
    stock = copy.deepcopy(sd3_pipe)
    vivace.accelerate(sd3_pipe, lora="side")
    lane = acceleration_of(sd3_pipe).target.lanes["transformer"]
    cleared = []
    lane.run.clear = lambda: cleared.append(1)  # what a recorded graph would be told
    pointers, bare = [], copy.deepcopy(stock.transformer)
    for seed, rank in enumerate((16, 4, 9)):
        factors = lora_of(bare, seed=seed, rank=rank)
        for pipe in (sd3_pipe, stock):
            pipe.unload_lora_weights()
            pipe.load_lora_weights(dict(factors), adapter_name=f"a{seed}")
        torch.testing.assert_close(sd3_latents(sd3_pipe), sd3_latents(stock), rtol=1e-3, atol=1e-3)
        pointers.append([side.up.data_ptr() for m in sd3_pipe.transformer.modules() if (side := side_of(m))])
        if seed == 0:
            cleared.clear()
    assert pointers[0] == pointers[1] == pointers[2]
    assert not cleared
    sd3_pipe.load_lora_weights(lora_of(bare, rank=20), adapter_name="wide")
    sd3_pipe.set_adapters("wide")
    sd3_latents(sd3_pipe)
    assert cleared
    assert vivace.report(sd3_pipe).calls["transformer"] == {"fused blocks": 12}


def test_no_weight_is_touched(sd3_pipe, sd3_latents, lora_of):
    vivace.accelerate(sd3_pipe, lora="side")
    sd3_latents(sd3_pipe)
    before = [parameter.clone() for parameter in sd3_pipe.transformer.parameters()]
    sd3_pipe.load_lora_weights(lora_of(sd3_pipe.transformer))
    sd3_latents(sd3_pipe)
    assert all(torch.equal(a, b) for a, b in zip(sd3_pipe.transformer.parameters(), before, strict=True))
    sd3_pipe.unload_lora_weights()
    sd3_latents(sd3_pipe)
    assert all(type(module).__name__ != "Side" and side_of(module) is None for module in sd3_pipe.transformer.modules())


@pytest.mark.parametrize("mode", ["merged", "side"])
@pytest.mark.parametrize("family", FUSED)
def test_every_family_with_fused_blocks(family, mode, lora_of):
    """On all linears of its blocks, as stock computes them; fused where the family says that it can."""
    pipe, known = FAMILIES[family].tiny(), FAMILIES[family]
    name = known.denoisers[0]
    denoiser = getattr(pipe, name)
    if not hasattr(pipe, "load_lora_weights"):
        pytest.skip("its pipeline takes no LoRA")
    within = "blocks" if any("blocks" in blocks for blocks in known.blocks) else known.blocks[-1]
    factors = lora_of(denoiser, prefix=name, within=within, std=0.1)
    arguments = known.inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=8, seed=0)
    stock = copy.deepcopy(pipe)
    outputs = []
    for one in (stock, vivace.accelerate(pipe, lora=mode)):
        with torch.no_grad():
            plain = tree_leaves(getattr(one, name)(**arguments))[0]
            one.load_lora_weights(dict(factors))
            outputs.append(tree_leaves(getattr(one, name)(**arguments))[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outputs[0], plain, atol=1e-2)
    assert set(vivace.report(pipe).calls[name]) == {"fused blocks"}


@pytest.mark.parametrize("order", ["load first", "cast first"])
def test_layers_behind_hooks_stay_with_peft(sd3_pipe, lora_of, order):
    """Hooks call the forward that they found, so what is beside a layer would be left out."""
    stock, file = copy.deepcopy(sd3_pipe), lora_of(sd3_pipe.transformer)
    steps = [
        lambda pipe: pipe.load_lora_weights(dict(file)),
        lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float32, torch.float32),
    ]
    bare = call(stock)
    vivace.accelerate(sd3_pipe, lora="side")
    for step in steps if order == "load first" else reversed(steps):
        step(sd3_pipe)
        step(stock)
    assert not torch.allclose(call(stock), bare, atol=1e-2)
    assert torch.equal(call(sd3_pipe), call(stock))
    vivace.restore(sd3_pipe)
    with pytest.raises(InputError, match="carries a hook, behind which nothing is added"):
        vivace.accelerate(sd3_pipe, lora="side")
