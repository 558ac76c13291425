"""Which family a bare image UNet belongs to, and that the recorded text encoder is the published kind."""

import diffusers
import pytest

from vivace.families import FAMILIES, sd, sdxl
from vivace.family import UnknownFamilyError, family_of


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (sd.TINY, "sd"),
        ({**sd.TINY, "in_channels": 9}, "sd"),
        ({**sd.TINY, "time_cond_proj_dim": 32}, "lcm"),
        (sdxl.TINY, "sdxl"),
        ({**sdxl.TINY, "time_cond_proj_dim": 32}, "sdxl"),
    ],
)
def test_a_bare_unet_is_recognised_by_its_configuration(config, family):
    assert family_of(diffusers.UNet2DConditionModel(**config)) is FAMILIES[family]


def test_a_unet_of_another_kind_is_not_claimed():
    unet = diffusers.UNet2DConditionModel(**sd.TINY, addition_embed_type="text", addition_embed_type_num_heads=4)
    with pytest.raises(UnknownFamilyError, match="UNet2DConditionModel"):
        family_of(unet)


def test_pix2pix_sees_the_picture_beside_the_noise():
    assert sd.tiny("StableDiffusionInstructPix2PixPipeline").unet.config.in_channels == 8
    assert sd.tiny().unet.config.in_channels == 4


def test_a_controlnet_changes_the_picture(quick):
    pipe = sd.tiny("StableDiffusionControlNetPipeline")
    changed, plain = quick(pipe), quick(pipe, controlnet_conditioning_scale=0.0)
    assert (changed.images - plain.images).abs().max() > 1e-3
