"""An autoencoder that overflows in float16 is brought into its range, and back to the bit."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from diffusers import AutoencoderKL

from vivace.families import FAMILIES
from vivace.fused import vae_range
from vivace.one_off import give_class


@pytest.fixture
def vae():
    """A tiny autoencoder whose second half of the decoder goes far beyond 65504."""
    torch.manual_seed(0)
    vae = FAMILIES["sdxl"].tiny().vae
    vae.register_to_config(force_upcast=True)
    for block in (vae.decoder.up_blocks[1], vae.encoder.down_blocks[1]):
        block.resnets[-1].conv2.weight.data *= 3e5
    return vae


def through(vae, dtype=None):
    torch.manual_seed(1)
    z, x = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32) * 2 - 1
    dtype = dtype or vae.dtype
    with torch.no_grad():
        return vae.decode(z.to(dtype)).sample.float(), vae.encode(x.to(dtype)).latent_dist.mode().float()


def test_float16_without_float32(vae, tmp_path):
    exact = through(vae)
    half = vae.to(torch.float16)
    stock = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    eps = [norm.eps for norm in vae_range._norms(half)]
    assert not all(result.isfinite().all() for result in through(half)), "nothing overflows: the test tests nothing"
    assert vae_range.overflows(half)
    assert vae_range.refuses(half) is None
    with ExitStack() as undo:
        exponent = vae_range.exponent(half)
        assert exponent > 4
        vae_range.Scaled(half, exponent).install(undo=undo)
        assert not vae_range.overflows(half)
        for ours, wanted in zip(through(half), exact, strict=True):
            assert (ours - wanted).norm() < 5e-3 * wanted.norm()
        half.save_pretrained(tmp_path)
        assert not vae_range.overflows(half)
    assert vae_range.overflows(half)
    assert all(torch.equal(tensor, stock[name]) for name, tensor in half.state_dict().items())
    assert [norm.eps for norm in vae_range._norms(half)] == eps
    saved = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert saved.config.force_upcast
    assert all(torch.equal(tensor, stock[name]) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize("made", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["copy", "pickle"])
def test_copies_are_as_they_were(vae, made):
    half = vae.to(torch.float16)
    stock = copy.deepcopy(half)
    with ExitStack() as undo:
        vae_range.Scaled(half, 6).install(undo=undo)
        undo.callback(give_class(half, {"decode": type(half).decode}))
        again = made(half)
        assert not vae_range.overflows(half)
    assert type(again) is AutoencoderKL
    assert vae_range.overflows(again)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in stock.state_dict().items())
    assert [norm.eps for norm in vae_range._norms(again)] == [norm.eps for norm in vae_range._norms(stock)]


@pytest.mark.parametrize("assign", [False, True])
def test_what_it_shows_and_what_is_loaded_into_it_is_not_scaled(vae, assign):
    other = copy.deepcopy(vae)
    for parameter in other.parameters():
        parameter.data *= 1.5
    exact = through(other)
    half, loaded = vae.to(torch.float16), {n: t.half() for n, t in other.state_dict().items()}
    stock = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    with ExitStack() as undo:
        vae_range.Scaled(half, vae_range.exponent(half)).install(undo=undo)
        shown = half.state_dict(prefix="vae.")
        assert [*shown] == [f"vae.{name}" for name in stock]
        assert all(torch.equal(shown[f"vae.{name}"], tensor) for name, tensor in stock.items())
        half.load_state_dict({name: tensor.clone() for name, tensor in loaded.items()}, assign=assign)
        for ours, wanted in zip(through(half), exact, strict=True):
            assert (ours - wanted).norm() < 5e-3 * wanted.norm()
        assert all(torch.equal(half.state_dict()[name], tensor) for name, tensor in loaded.items())
    assert all(torch.equal(half.state_dict()[name], tensor) for name, tensor in loaded.items())


def test_in_float32_a_power_of_two_changes_nothing(vae):
    """That every reader of what was scaled is a norm: a convolution forgotten would show here."""
    vae = vae.double()
    before = through(vae)
    with ExitStack() as undo:
        vae_range.Scaled(vae, 12).install(undo=undo)
        torch.testing.assert_close(through(vae), before, rtol=1e-9, atol=1e-9)


def test_what_fits_is_not_scaled():
    vae = FAMILIES["sdxl"].tiny().vae.to(torch.float16)
    assert vae_range.exponent(vae) == 0


def test_other_autoencoders_are_refused():
    assert "AutoencoderKLTemporalDecoder" in vae_range.refuses(FAMILIES["svd"].tiny().vae)
