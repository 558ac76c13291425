"""Decoding in strips: the pixels of a whole decode, wherever the strips' borders lie."""

import pytest
import torch
from diffusers import AutoencoderKL

from vivace.families import FAMILIES
from vivace.memory import strips


@pytest.fixture(scope="module")
def vae():
    """Small, with every kind of layer, and norms that are far from the identity."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    for parameter in vae.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vae


@pytest.mark.parametrize("limit", [1, 3000, 20_000, 2**30])
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (2, 4, 9, 21)], ids=str)
def test_the_same_pixels(vae, monkeypatch, limit, shape):
    monkeypatch.setattr(strips, "LIMIT", limit)
    z = torch.randn(shape)
    with torch.no_grad():
        whole = vae.decode(z).sample
    torch.testing.assert_close(strips.decode(vae, z), whole, rtol=1e-3, atol=1e-4)


def test_tiles_would_have_seams(vae):
    """What stock tiling gives on the same VAE is another picture, which is why strips are there."""
    z = torch.randn(1, 4, 24, 24)
    with torch.no_grad():
        whole = vae.decode(z).sample
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = 12, 48
        tiled = vae.decode(z).sample
        vae.disable_tiling()
    assert (tiled - whole).abs().max() > 100 * (strips.decode(vae, z) - whole).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_vaes_can(family):
    vae = FAMILIES[family].tiny().vae
    reason = strips.refuses(vae)
    assert (reason is None) == (type(vae).__name__ in ("AutoencoderKL", "AutoencoderKLFlux2")), reason


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["cuda", "cpu"])
def test_memory_on_the_device(store):
    vae = FAMILIES["flux"].full(component="vae", device="cuda", dtype=torch.bfloat16)
    z = torch.randn(1, 16, 256, 256, device="cuda", dtype=torch.bfloat16)
    peaks = {}
    for name, decode in {
        "whole": lambda: vae.decode(z).sample,
        "strips": lambda: strips.decode(vae, z, store=torch.device(store)),
    }.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            decode()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks["strips"] < peaks["whole"]
    if store == "cpu":
        assert peaks["strips"] < strips.work(vae, width=2048, height=2048)
