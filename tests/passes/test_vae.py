"""The pass over the autoencoder: the same pictures by every way, no float32, and stock again afterwards."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

import vivace
from vivace.families import FAMILIES
from vivace.kernels.rehearsal import skeleton
from vivace.passes.vae import rehearsed_calls


def note(pipe):
    return next(note for note in vivace.report(pipe).passes if note.name == "vae")


def picture(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {} if "image" in options else {"height": 64, "width": 64}
    return np.asarray(pipe("a fox", num_inference_steps=2, generator=generator, **size, **options).images[0]).astype(
        int
    )


@pytest.fixture
def half():
    """A tiny SDXL in float16 whose autoencoder its pipeline widens for every picture."""
    pipe = FAMILIES["sdxl"].tiny()
    pipe.vae.register_to_config(force_upcast=True)
    return pipe.to(torch.float16)


def types_seen(vae):
    """The types of the latents at every decode from now on."""
    seen = []
    # Not on the decoder, whose hooks would be respected.
    vae.post_quant_conv.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    return seen


def test_no_float32_in_float16(half):
    seen = types_seen(half.vae)
    stock = picture(half)
    vivace.accelerate(half)
    ours = picture(half)
    vivace.restore(half)
    assert np.array_equal(picture(half), stock)
    assert [seen[0], seen[-2], seen[-1]] == [torch.float32, torch.float16, torch.float32]
    assert np.abs(ours - stock).max() <= 2
    assert half.vae.config.force_upcast


def test_image_to_image_encodes_in_float16_too(half):
    from PIL import Image

    pipe = StableDiffusionXLImg2ImgPipeline(**half.components)
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    stock = picture(pipe, image=image, strength=0.9)
    vivace.accelerate(pipe)
    assert "stays in float16" in note(pipe).detail
    assert np.abs(picture(pipe, image=image, strength=0.9) - stock).max() <= 4
    vivace.restore(pipe)


@pytest.mark.parametrize("family", ["sdxl", "flux", "wan", "svd"])
def test_stock_again(family):
    pipe = FAMILIES[family].tiny()
    classes = [type(module) for module in pipe.vae.modules()]
    weights = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    vivace.accelerate(pipe)
    assert note(pipe).done
    assert "fused" in note(pipe).detail
    vivace.restore(pipe)
    assert [type(module) for module in pipe.vae.modules()] == classes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.vae.state_dict().items())
    assert type(getattr(pipe, "image_processor", None) or pipe.video_processor).__module__.startswith("diffusers")


def test_what_svd_widens_is_said():
    pipe = FAMILIES["svd"].tiny()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    vivace.accelerate(pipe)
    assert "widens it to float32 for every picture: a AutoencoderKLTemporalDecoder" in note(pipe).detail
    vivace.restore(pipe)


def test_off_and_strips(unet_pipe):
    with torch.no_grad():
        z = torch.randn(1, 4, 8, 8)
        stock = unet_pipe.vae.decode(z).sample
        vivace.accelerate(unet_pipe, vae="off")
        assert not note(unet_pipe).done
        vivace.accelerate(unet_pipe)
        from vivace.memory import strips

        torch.testing.assert_close(strips.decode(unet_pipe.vae, z), stock, rtol=1e-3, atol=1e-4)
        assert strips.refuses(unet_pipe.vae) is None
        vivace.restore(unet_pipe)


def test_offloaded_blocks_are_left():
    pipe = FAMILIES["sdxl"].tiny()
    pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda module, arguments: None)
    vivace.accelerate(pipe)
    assert note(pipe).detail == "its blocks carry hooks"
    with pytest.raises(vivace.InputError, match="its blocks carry hooks"):
        vivace.accelerate(pipe, vae="on")
    vivace.restore(pipe)


def test_the_plan_says_it():
    assert "residual blocks" in str(vivace.plan("sdxl", device="cpu", dtype="float32"))
    assert "stays in float16" in str(vivace.plan("sdxl", device="cpu", dtype="float16"))


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.vae_class])
def test_every_decoder_can_be_rehearsed(family):
    """On a GPU its kernels are compiled so, before the first picture."""
    vae = FAMILIES[family].tiny().vae
    with torch.no_grad():
        for kwargs in rehearsed_calls(vae):
            assert 3 in skeleton(vae).decode(**kwargs, return_dict=False)[0].shape


def hook(vae):
    """What an offload that came later leaves on every layer: a forward of the instance's around the one it found."""
    from accelerate import cpu_offload

    cpu_offload(vae, torch.device("cpu"))


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_hooks_that_came_later_compute_stock_again_after_restore(family):
    pipe = FAMILIES[family].tiny()
    z = torch.randn(1, 4, 8, 8) if family == "sdxl" else torch.randn(1, pipe.vae.config.z_dim, 2, 8, 8)

    @torch.no_grad()
    def decoded():
        return pipe.vae.decode(z).sample

    stock = decoded()
    vivace.accelerate(pipe)
    hook(pipe.vae)
    torch.testing.assert_close(decoded(), stock, rtol=1e-3, atol=1e-4)
    vivace.accelerate(pipe, fuse="off")
    assert note(pipe).detail == "its blocks carry hooks"
    assert torch.equal(decoded(), stock)
    vivace.restore(pipe)
    assert torch.equal(decoded(), stock)


def test_a_compiled_autoencoder_is_fused_inside_of_its_wrapper(unet_pipe):
    stock = picture(unet_pipe)
    unet_pipe.vae = torch.compile(unet_pipe.vae, backend="eager")
    assert isinstance(unet_pipe.vae, torch._dynamo.OptimizedModule)
    vivace.accelerate(unet_pipe)
    assert note(unet_pipe).done
    assert np.abs(picture(unet_pipe) - stock).max() <= 1
    vivace.restore(unet_pipe)
    assert np.array_equal(picture(unet_pipe), stock)
