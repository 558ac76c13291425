"""A decode that runs out of memory: strips are tried, and what could not be decoded is in a file."""

import pytest
import torch
from safetensors.torch import load_file

from vivace import InputError
from vivace.families import FAMILIES
from vivace.memory import strips
from vivace.memory.decode import rescue


@pytest.fixture
def vae():
    return FAMILIES["sd3"].tiny().vae


@pytest.fixture
def full(monkeypatch):
    """Lets the ways to decode that it is given run out of memory."""

    def fill(vae, *, whole=True, in_strips=(), tiled=False):
        def fails(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        stock, by_strips = type(vae).decode, strips.decode

        def decode(self, z, *args, **kwargs):
            return fails() if (tiled if self.use_tiling else whole) else stock(self, z, *args, **kwargs)

        def in_some(vae, z, *, store=None):
            return fails() if str(store) in in_strips else by_strips(vae, z, store=store)

        monkeypatch.setattr(type(vae), "decode", decode)
        monkeypatch.setattr(strips, "decode", in_some)

    return fill


def latents(vae):
    return torch.randn(1, vae.config.latent_channels, 8, 8)


@pytest.mark.parametrize("in_strips", [(), ("None",)])
def test_strips_step_in(vae, full, in_strips, caplog):
    z, wanted = latents(vae), None
    with torch.no_grad():
        wanted = vae.decode(z).sample
    full(vae, in_strips=in_strips)
    undo = rescue(vae)
    torch.testing.assert_close(vae.decode(z).sample, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
    assert "ran out of memory whole; the latents are kept" in caplog.text
    undo()
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(z)


def test_a_plan_for_strips_never_tries_the_whole(vae, full):
    tried = []
    full(vae, whole=True)
    rescue(vae, in_strips=True, room=lambda: tried.append(1) or 0)
    assert vae.decode(latents(vae)).sample.shape == (1, 3, 64, 64)
    assert tried


def test_what_nothing_decodes_is_kept(vae, full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    z = latents(vae)
    full(vae, in_strips=("None", "cpu"))
    rescue(vae)
    with pytest.raises(InputError, match="the latents are in") as error:
        vae.decode(z)
    (file,) = tmp_path.iterdir()
    assert str(file) in str(error.value)
    assert torch.equal(load_file(file)["latents"], z)


def test_recordings_give_way_when_nothing_else_helps(vae, full, monkeypatch):
    z, recorded = latents(vae), [True]
    full(vae)
    by_strips = strips.decode

    def beside_recordings(vae, z, *, store=None):
        if recorded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return by_strips(vae, z, store=store)

    monkeypatch.setattr(strips, "decode", beside_recordings)
    rescue(vae, release=recorded.clear)
    assert vae.decode(z).sample.shape == (1, 3, 64, 64)
    assert not recorded


def test_recordings_stay_where_there_is_room(vae):
    rescue(vae, release=lambda: 1 / 0)
    assert vae.decode(latents(vae)).sample.shape == (1, 3, 64, 64)


def test_other_vaes_try_tiles(full):
    vae = FAMILIES["qwen_image"].tiny().vae
    z = torch.randn(1, vae.config.z_dim, 1, 8, 8)
    with torch.no_grad():
        wanted = vae.decode(z).sample
    full(vae)
    rescue(vae)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).sample, wanted, rtol=1e-3, atol=1e-3)
    assert vae.use_tiling is False


@pytest.mark.parametrize("planned", [False, True])
def test_a_video_that_is_a_batch_comes_in_a_few_frames_at_a_time(monkeypatch, planned):
    vae, tried = FAMILIES["svd"].tiny().vae, []
    stock = type(vae).decode

    def decode(self, z, num_frames, return_dict=True):
        tried.append((len(z), num_frames))
        if len(z) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(self, z, num_frames, return_dict)

    monkeypatch.setattr(type(vae), "decode", decode)
    rescue(vae, in_strips=planned)
    z = torch.randn(12, vae.config.latent_channels, 8, 8)
    with torch.no_grad():
        made = vae.decode(z, num_frames=6).sample
        wanted = [stock(vae, z[first:last], last - first).sample for first, last in ((0, 4), (4, 6), (6, 10), (10, 12))]
    assert torch.equal(made, torch.cat(wanted))
    assert tried == [(12, 6)] * (not planned) + [(4, 4), (2, 2)] * 2


def test_latents_by_any_name_and_place():
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = vae.decode(x).sample
    rescue(vae)
    for found in (vae.decode(x=x).sample, vae.decode(x, return_dict=False)[0], vae.decode(x, None, False)[0]):
        assert torch.equal(found, wanted)
