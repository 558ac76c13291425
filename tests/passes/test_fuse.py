"""Fused blocks step aside for what they do not compute; on a GPU their kernels are compiled before the first call."""

import copy
from collections import Counter
from contextlib import ExitStack

import pytest
import torch

import vivace
from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.fused import fused_of
from vivace.fused.elementwise import KERNELS
from vivace.passes.fuse import FirstCalls
from vivace.quant.linear import QuantLinear

pytestmark = pytest.mark.usefixtures("interpreted")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def drawn(model, arguments) -> torch.Tensor:
    """What a denoiser makes, as one tensor where it makes a list."""
    out = model(**arguments)[0]
    return torch.stack(out) if isinstance(out, list) else out


def served(denoiser) -> dict[str, int]:
    return vivace.report(denoiser).calls["denoiser"]


def unet_image(unet):
    """Random weights in the layout of the published IP-Adapters, with 4 tokens a picture, and the argument they add."""
    width = unet.config.cross_attention_dim
    image = {"proj.weight": torch.randn(4 * width, 32), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    keys = {}
    for index, name in enumerate(name for name in unet.attn_processors):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            keys |= {f"{index}.to_k_ip.weight": torch.randn(inner, width)}
            keys |= {f"{index}.to_v_ip.weight": torch.randn(inner, width)}
    argument = {"added_cond_kwargs": {"image_embeds": [torch.randn(1, 1, 32)]}}
    return {"image_proj": image, "ip_adapter": keys}, argument


def flux_image(transformer):
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    image = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.randn(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    keys = {}
    for index in range(len(transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            keys |= {f"{index}.{name}.weight": torch.randn(inner, width), f"{index}.{name}.bias": torch.randn(inner)}
    argument = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(1, 1, 16)]}}
    return {"image_proj": image, "ip_adapter": keys}, argument


@pytest.mark.parametrize(("family", "image", "fused"), [("sd", unet_image, True), ("flux", flux_image, False)])
def test_an_ip_adapter_that_comes_later(family, image, fused):
    """A UNet's blocks take it in; FLUX's leave the call to stock, and say so."""
    pipe = FAMILIES[family].tiny()
    denoiser = getattr(pipe, FAMILIES[family].denoisers[0])
    stock = copy.deepcopy(denoiser)
    arguments = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=1, frames=1, text_tokens=7, seed=0)
    weights, argument = image(denoiser)
    with torch.no_grad():
        vivace.accelerate(denoiser)
        torch.testing.assert_close(denoiser(**arguments)[0], stock(**arguments)[0], **CLOSE)
        assert served(denoiser) == {"fused blocks": 1}
        for model in (denoiser, stock):
            model._load_ip_adapter_weights([copy.deepcopy(weights)])
        ours, theirs = (model(**arguments, **copy.deepcopy(argument))[0] for model in (denoiser, stock))
        torch.testing.assert_close(ours, theirs, **CLOSE)
        others = {reason for reason in served(denoiser) if reason != "fused blocks"}
        assert served(denoiser)["fused blocks"] == (2 if fused else 1)
        assert fused or any("IPAdapter" in reason or "ImageProjection" in reason for reason in others)


TARGETS = {
    "sd": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2", "conv1", "conv2"],
    "sdxl": ["to_q", "to_v", "to_out.0", "proj_in", "net.2", "conv_shortcut", "time_emb_proj"],
    "flux": ["to_q", "to_v", "to_out.0", "to_add_out", "proj_mlp", "proj_out", "net.0.proj", "net.2", "norm.linear"],
    "flux2": ["to_q", "add_k_proj", "to_add_out", "to_qkv_mlp_proj", "linear_in", "linear_out", "proj_out"],
    "sd3": ["to_q", "add_k_proj", "to_out.0", "net.0.proj", "net.2", "norm1.linear", "context_embedder"],
    "qwen_image": ["to_q", "add_v_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2", "img_mod.1", "txt_in"],
    "z_image": ["to_q", "to_v", "to_out.0", "w1", "w2", "adaLN_modulation.1", "cap_embedder.1"],
    "wan": ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "time_proj", "text_embedder.linear_1"],
}


@pytest.mark.parametrize("effect", ["side", "merged"])
@pytest.mark.parametrize("family", TARGETS)
def test_adapters_inside_fused_blocks(family, effect):
    """Beside a linear, a convolution or a part of a stack: what PEFT computes, on the fused path."""
    from peft import LoraConfig

    denoiser = getattr(FAMILIES[family].tiny(), FAMILIES[family].denoisers[0])
    stock = copy.deepcopy(denoiser)
    arguments = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=2, frames=1, text_tokens=7, seed=0)
    with torch.no_grad():
        vivace.accelerate(denoiser, lora=effect)
        plain = drawn(denoiser, arguments)
        for model in (denoiser, stock):
            torch.manual_seed(3)
            model.add_adapter(LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights=False))
        ours, theirs = drawn(denoiser, arguments), drawn(stock, arguments)
    assert not torch.allclose(ours, plain, **CLOSE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert served(denoiser) == {"fused blocks": 2}


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("family", [*TARGETS, "pixart"])  # which takes no adapters
def test_quantised_layers_inside_fused_blocks(family, format):
    """As far from the 16-bit model as the stock blocks with the same layers are."""
    denoiser = getattr(FAMILIES[family].tiny(), FAMILIES[family].denoisers[0])
    arguments = FAMILIES[family].inputs(denoiser, size=(64, 64), batch=2, frames=1, text_tokens=7, seed=0)
    with torch.no_grad():
        exact = drawn(denoiser, arguments)
        vivace.accelerate(denoiser, quant=format, fuse="off")
        stock = drawn(denoiser, arguments)
        vivace.accelerate(denoiser, quant=format, fuse="on")
        fused = drawn(denoiser, arguments)
        ours, theirs = ((out - exact).norm() / exact.norm() for out in (fused, stock))
        assert 1e-5 < ours < 1.5 * theirs
        assert served(denoiser) == {"fused blocks": 1}
        assert torch.equal(drawn(vivace.restore(denoiser), arguments), exact)


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "qwen_image", "z_image"])
def test_kernels_hand_quantised_rows_to_the_layers_that_take_them(family, monkeypatch):
    taken = Counter()
    product = QuantLinear.forward

    def counted(self, x):
        # What reads one row a sample is not of this format.
        taken.update([type(x).__name__] if self.format.name == "fp8" else [])
        return product(self, x)

    monkeypatch.setattr(QuantLinear, "forward", counted)
    denoiser = getattr(FAMILIES[family].tiny(), FAMILIES[family].denoisers[0])
    arguments = FAMILIES[family].inputs(denoiser, size=(32, 32), batch=1, frames=1, text_tokens=7, seed=0)
    with torch.no_grad(), ExitStack() as undo:
        vivace.accelerate(denoiser, quant="fp8", fuse="off")
        stock = drawn(denoiser, arguments)
        taken.clear()
        call = fused_of(FAMILIES[family]).fuse(denoiser, attend=NATIVE.attend, undo=undo, elementwise=KERNELS)
        fused = drawn(call, arguments)
    assert taken["RowScaled"] >= taken["Tensor"]
    assert (fused - stock).norm() < 0.05 * stock.norm()


def test_what_a_class_keeps_in_fp32_beside_its_type_is_fused(tmp_path):
    transformer = FAMILIES["wan"].tiny().transformer
    transformer.save_pretrained(tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, torch.bfloat16}
    vivace.accelerate(loaded, fuse="on")
    arguments = FAMILIES["wan"].inputs(loaded, size=(64, 64), batch=1, frames=1, text_tokens=7, seed=0)
    with torch.no_grad():
        fused = loaded(**arguments)[0]
        assert served(loaded) == {"fused blocks": 1}
        stock = vivace.restore(loaded)(**arguments)[0]
    assert fused.dtype == stock.dtype
    torch.testing.assert_close(fused, stock, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_under_autocast_weights_of_another_type_stay_stock(family):
    pipe = FAMILIES[family].tiny()
    stock = copy.deepcopy(pipe)

    def latents(pipe):
        drawn = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
        return pipe(prompt="a frog", generator=torch.Generator().manual_seed(0), **drawn).images

    vivace.accelerate(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(latents(pipe), latents(stock))
    calls = vivace.report(pipe).calls["transformer"]
    assert calls == {"its weights are in float32, and autocast asks for bfloat16": 2}
    # What was encoded there is not what is asked for here.
    torch.testing.assert_close(latents(pipe), latents(stock), rtol=1e-4, atol=1e-4)
    assert vivace.report(pipe).calls["transformer"]["fused blocks"] == 2
    pipe.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents(pipe)
    assert vivace.report(pipe).calls["transformer"]["fused blocks"] == 4


def test_weights_of_several_types_stay_stock():
    unet = FAMILIES["sd"].tiny().unet
    unet.conv_out.to(torch.bfloat16)
    vivace.accelerate(unet)
    notes = {note.name: note for note in vivace.report(unet).passes}
    assert notes["fuse"].detail == "its weights are of several types, bfloat16 and float32"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["flux", "flux2", "sd", "sdxl", "lcm", "sd3", "qwen_image", "z_image"])
def test_on_a_gpu(family, dtype):
    """As near to fp64 as stock, at sizes that compile nothing more."""
    import triton

    pipe = FAMILIES[family].tiny().to("cuda", dtype)
    denoiser = getattr(pipe, FAMILIES[family].denoisers[0])
    exact = copy.deepcopy(denoiser).double()
    stock = copy.deepcopy(denoiser)
    vivace.accelerate(denoiser, graphs="off")
    notes = {note.name: note.detail for note in vivace.report(denoiser).passes}
    assert "kernels compiled in" in notes["fuse"], notes["fuse"]
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["fn"].name)
    try:
        for size, batch in (((64, 64), 2), ((256, 192), 1), ((528, 784), 3)):
            arguments = FAMILIES[family].inputs(denoiser, size=size, batch=batch, frames=1, text_tokens=77, seed=0)
            wide = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments
            )
            with torch.no_grad():
                right = drawn(exact, wide)
                ours, theirs = ((drawn(m, arguments) - right).norm() / right.norm() for m in (denoiser, stock))
            assert ours <= 1.2 * theirs + 1e-3, (size, batch)
        assert compiled == []
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert set(served(denoiser)) == {"fused blocks"}


def test_blocks_that_stay_stock_after_all_are_in_the_report(monkeypatch):
    """What `check_fuse` found in order may not be any more when the blocks are built: a pass between hung something."""
    found = iter([None])
    monkeypatch.setattr("vivace.passes.fuse.unfusable", lambda *_, **__: next(found, "a hook on its blocks"))
    unet = FAMILIES["sd"].tiny().unet
    vivace.accelerate(unet)
    note = next(note for note in vivace.report(unet).to_dict()["passes"] if note["name"] == "fuse")
    assert (note["done"], note["detail"]) == (False, "denoiser: a hook on its blocks")


def test_the_first_calls_of_attention_are_those_of_the_usual_request():
    made = []

    def attend(q, k, v, *, mask=None, scale=None):
        made.append([(x.shape, x.stride(), x.device.type) for x in (q, k, v)])
        return q

    first = FirstCalls(attend, device=torch.device("cpu"))
    small, usual = (torch.empty(2, tokens, 3 * 4, 8, device="meta") for tokens in (16, 64))
    for x in first.of_the_last([small, usual]):
        q, k, v = x.chunk(3, dim=2)
        for _ in range(2):
            assert first(q, k, v).is_meta
        first(q, k, v, mask=torch.empty(1, device="meta"))
    assert not made
    first.make()
    assert made == [[((2, 64, 4, 8), (64 * 96, 96, 8, 1), "cpu")] * 3]
