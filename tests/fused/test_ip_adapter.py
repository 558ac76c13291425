"""IP-Adapters within the fused UNet blocks: one or two, any strength, against stock."""

import importlib

import pytest
import torch
from torch.utils._pytree import tree_map_only

import vivace
from vivace.families import FAMILIES
from vivace.memory.here import comes

TOKENS = 4


def adapter(unet, *, seed):
    """Random weights of an IP-Adapter, as its files hold them."""
    draw = torch.Generator().manual_seed(seed)
    width, attentions = unet.config.cross_attention_dim, {}
    number = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            size = module.to_q.in_features
            for key in ("to_k_ip", "to_v_ip"):
                attentions[f"{number}.{key}.weight"] = torch.randn(size, width, generator=draw) * 0.3
            number += 2
    projection = {
        "proj.weight": torch.randn(TOKENS * width, 12, generator=draw) * 0.3,
        "proj.bias": torch.zeros(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": attentions}


def inputs(family, unet, *, adapters, pictures=1):
    arguments = FAMILIES[family].inputs(unet, size=(64, 64), batch=2, text_tokens=9)
    draw = torch.Generator().manual_seed(5)
    shown = [torch.randn(2, pictures, 12, generator=draw) for _ in range(adapters)]
    added = {**arguments.get("added_cond_kwargs", {}), "image_embeds": shown}
    return tree_map_only(torch.Tensor, torch.clone, {**arguments, "added_cond_kwargs": added})


def strengthen(unet, *scales):
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale[:] = scales


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("adapters", "pictures"), [(1, 1), (1, 2), (2, 1)])
def test_against_stock(family, adapters, pictures):
    unet = FAMILIES[family].tiny().unet.eval()
    unet._load_ip_adapter_weights([adapter(unet, seed=seed) for seed in range(adapters)])
    arguments = inputs(family, unet, adapters=adapters, pictures=pictures)
    with torch.no_grad():
        results = []
        for strength in (0.6, 0.0, 1.3):
            strengthen(unet, strength, *[0.4] * (adapters - 1))
            stock = unet(**arguments)[0]
            vivace.accelerate(unet, fuse="on")
            torch.testing.assert_close(unet(**arguments)[0], stock, rtol=1e-3, atol=1e-4)
            assert set(vivace.report(unet).calls["denoiser"]) == {"fused blocks"}
            vivace.restore(unet)
            assert torch.equal(unet(**arguments)[0], stock)
            results.append(stock)
    assert not torch.allclose(results[0], results[1], rtol=1e-2, atol=1e-3)


def test_another_strength_while_accelerated():
    unet = FAMILIES["sdxl"].tiny().unet.eval()
    unet._load_ip_adapter_weights([adapter(unet, seed=0)])
    arguments = inputs("sdxl", unet, adapters=1)
    with torch.no_grad():
        strengthen(unet, 0.2)
        wanted = unet(**arguments)[0]
        strengthen(unet, 1.0)
        vivace.accelerate(unet, fuse="on")
        unet(**arguments)
        before = unet.__class__.vivace_acceleration.target.lanes["denoiser"]._watch
        assert not before.changed()
        strengthen(unet, 0.2)
        assert before.changed()  # a recorded graph would hold the old one
        torch.testing.assert_close(unet(**arguments)[0], wanted, rtol=1e-3, atol=1e-4)
        vivace.restore(unet)


def test_loaded_and_unloaded_while_accelerated():
    pipe = FAMILIES["sd"].tiny()
    unet = pipe.unet
    plain = FAMILIES["sd"].inputs(unet, size=(64, 64), batch=2, text_tokens=9)
    with torch.no_grad():
        stock = unet(**plain)[0]
        vivace.accelerate(unet, fuse="on")
        torch.testing.assert_close(unet(**plain)[0], stock, rtol=1e-3, atol=1e-4)
        unet._load_ip_adapter_weights([adapter(unet, seed=0)])
        arguments = inputs("sd", unet, adapters=1)
        with_picture = unet(**arguments)[0]
        assert set(vivace.report(unet).calls["denoiser"]) == {"fused blocks"}
        vivace.restore(unet)
        torch.testing.assert_close(with_picture, unet(**arguments)[0], rtol=1e-3, atol=1e-4)


def test_masks_take_the_stock_blocks():
    unet = FAMILIES["sd"].tiny().unet.eval()
    unet._load_ip_adapter_weights([adapter(unet, seed=0)])
    arguments = inputs("sd", unet, adapters=1)
    arguments["cross_attention_kwargs"] = {"ip_adapter_masks": [torch.ones(1, 1, 64, 64)]}
    with torch.no_grad():
        stock = unet(**arguments)[0]
        vivace.accelerate(unet)
        assert torch.equal(unet(**arguments)[0], stock)
        assert set(vivace.report(unet).calls["denoiser"]) == {"the call brings ip_adapter_masks"}
        vivace.restore(unet)


def test_a_whole_pipeline():
    pipe = FAMILIES["sdxl"].tiny()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet._load_ip_adapter_weights([adapter(pipe.unet, seed=0)])
    shown = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))

    def picture():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a fox", ip_adapter_image_embeds=[shown], num_inference_steps=3, height=64, width=64,
            generator=generator, output_type="pt",
        ).images  # fmt: skip

    stock = picture()
    vivace.accelerate(pipe, fuse="on")
    torch.testing.assert_close(picture(), stock, rtol=1e-3, atol=1e-3)
    assert set(vivace.report(pipe).calls["unet"]) == {"fused blocks"}
    vivace.restore(pipe)


def test_over_streamed_blocks(monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("vivace.accelerate"),
        "device_for",
        lambda config: torch.device("cpu") if config.vram else None,
    )
    unet = FAMILIES["sdxl"].tiny().unet.eval()
    unet._load_ip_adapter_weights([adapter(unet, seed=seed) for seed in range(2)])
    strengthen(unet, 0.6, 0.4)
    arguments = inputs("sdxl", unet, adapters=2)
    with torch.no_grad():
        wanted = vivace.accelerate(unet, fuse="on")(**arguments)[0]
        vivace.accelerate(unet, fuse="on", vram="streamed")
        assert torch.equal(unet(**arguments)[0], wanted)
    assert any(map(comes, unet.modules()))
    assert set(vivace.report(unet).calls["denoiser"]) == {"fused blocks"}
