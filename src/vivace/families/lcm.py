"""Latent Consistency Models on the Stable Diffusion 1.5 UNet, with embedded guidance (arXiv 2310.04378)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vivace.families import sd
from vivace.families.published import CLIP_L, SD_VAE
from vivace.families.unet import BLOCKS, KEEP_16BIT, inputs, split
from vivace.family import Family, Variant

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import LCMScheduler

    return sd.tiny_around({**sd.TINY, "time_cond_proj_dim": 32}, LCMScheduler, pipeline_class or LCM.pipelines[0])


def recognise(config: Mapping[str, Any]) -> bool:
    """The guidance scale is embedded beside the time."""
    return config["addition_embed_type"] is None and config["time_cond_proj_dim"] is not None


LCM = Family(
    name="lcm",
    title="Latent Consistency Model",
    pipelines=("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
    denoisers=("unet",),
    denoiser_class="UNet2DConditionModel",
    vae_class="AutoencoderKL",
    vae=SD_VAE,
    blocks=BLOCKS,
    guidance="embedded",
    prediction="epsilon",
    keep_16bit=KEEP_16BIT,
    variants={
        "dreamshaper-v7": Variant(
            denoiser={**sd.SD15, "time_cond_proj_dim": 256},
            parameters=859_602_884,
            hub_id="SimianLuo/LCM_Dreamshaper_v7",
            size=(768, 768),
            steps=4,
            guidance=8.5,
        ),
    },
    text_encoders={"text_encoder": CLIP_L},
    recognise=recognise,
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=8,
    takes=frozenset({"prompt", "guidance", "image", "strength"}),
    single_file=True,
)
