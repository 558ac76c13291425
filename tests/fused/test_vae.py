"""Fused autoencoders compute what the stock ones do, by every way in, and leave nothing behind."""

from contextlib import ExitStack

import pytest
import torch

from vivace.families import FAMILIES
from vivace.fused import vae as fused
from vivace.fused.elementwise import KERNELS, TORCH

FUSED = {
    "sdxl": {"residual blocks", "norms with their SiLU"},
    "flux2": {"residual blocks", "norms with their SiLU"},
    "svd": {"residual blocks", "norms with their SiLU"},
    "wan": {"norms with their SiLU", "causal convolutions", "upsamplings"},
    "qwen_image": {"norms with their SiLU", "causal convolutions", "upsamplings"},
}


def latents(vae, *, size=8):
    torch.manual_seed(0)
    if "z_dim" in vae.config:
        return torch.randn(1, vae.config.z_dim, 3, size, size)
    return torch.randn(2, vae.config.latent_channels, size, size)


def pixels(vae):
    torch.manual_seed(1)
    return torch.rand(1, 3, 5, 32, 32) if "z_dim" in vae.config else torch.rand(2, 3, 32, 32)


@torch.no_grad()
def through(vae, *, size=8):
    """A decode and an encode."""
    frames = {"num_frames": 2} if "TemporalDecoder" in type(vae.decoder).__name__ else {}
    decoded = vae.decode(latents(vae, size=size), **frames).sample
    return [decoded, vae.encode(pixels(vae)).latent_dist.mode()]


def varied(vae):
    """Norms with weights of their own, which a fresh model's all-one weights would hide."""
    torch.manual_seed(2)
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.2
    return vae


CASES = [pytest.param(family, TORCH, id=f"{family}-torch") for family in FUSED]
CASES += [
    # The interpreter takes a minute for the many groups of a video decoder.
    pytest.param(family, KERNELS, id=f"{family}-kernels", marks=[pytest.mark.full] if family == "svd" else [])
    for family in FUSED
]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_decode_and_encode(family, form):
    vae = varied(FAMILIES[family].tiny().vae)
    stock, classes = through(vae), [type(module) for module in vae.modules()]
    with ExitStack() as undo:
        counts = fused.fuse(vae, elementwise=form, undo=undo)
        ours = through(vae)
    assert set(counts) - {"activations"} == FUSED[family]
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()
    assert [type(module) for module in vae.modules()] == classes
    assert all(map(torch.equal, through(vae), stock))


@pytest.mark.parametrize("family", ["wan", "qwen_image"])
def test_the_torch_form_is_stock_to_the_bit(family):
    vae = varied(FAMILIES[family].tiny().vae).to(torch.bfloat16)
    z = latents(vae).to(vae.dtype)
    with torch.no_grad(), ExitStack() as undo:
        stock = vae.decode(z).sample
        fused.fuse(vae, elementwise=TORCH, undo=undo)
        assert torch.equal(vae.decode(z).sample, stock)


def test_channels_last_stays():
    vae = varied(FAMILIES["sdxl"].tiny().vae).to(memory_format=torch.channels_last)
    stock = through(vae)
    with ExitStack() as undo:
        fused.fuse(vae, elementwise=KERNELS, undo=undo)
        torch.testing.assert_close(through(vae), stock, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mode", ["tiling", "slicing"])
def test_tiles_and_slices(mode):
    vae = varied(FAMILIES["sdxl"].tiny().vae)
    getattr(vae, f"enable_{mode}")()
    stock = through(vae, size=16)
    with ExitStack() as undo:
        fused.fuse(vae, elementwise=TORCH, undo=undo)
        torch.testing.assert_close(through(vae, size=16), stock, rtol=2e-4, atol=2e-5)


def test_gradients_take_the_stock_blocks():
    vae = varied(FAMILIES["sdxl"].tiny().vae)
    with ExitStack() as undo:
        fused.fuse(vae, elementwise=KERNELS, undo=undo)
        vae.decode(latents(vae)).sample.sum().backward()
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0


def test_an_offload_hook_on_a_convolution_is_heeded():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.calls += 1
            return args, kwargs

    vae = varied(FAMILIES["sdxl"].tiny().vae)
    stock = through(vae)
    with ExitStack() as undo:
        fused.fuse(vae, elementwise=KERNELS, undo=undo)
        add_hook_to_module(vae.decoder.mid_block.resnets[0].conv1, Counts())
        torch.testing.assert_close(through(vae), stock, rtol=2e-4, atol=2e-5)
    assert Counts.calls == 1


def test_what_has_no_norms_is_left():
    from diffusers import AutoencoderTiny

    assert "has no norms" in fused.check(AutoencoderTiny())
