"""Stable Diffusion 1.5 and 2.1 (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.published import CLIP_L, OPENCLIP_H, SD_NOISE, SD_VAE
from vivace.families.unet import BLOCKS, KEEP_16BIT, inputs, split
from vivace.family import Family, Variant

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SD15: Mapping[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # a count of heads, in spite of its name
}
SD21: Mapping[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD2_TEXT = {"text_encoder": OPENCLIP_H}

TINY: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": small.WIDTH,
    "attention_head_dim": 2,
}
# Pix2Pix sees the picture it edits beside the noise.
TINY_CHANNELS = {"StableDiffusionInstructPix2PixPipeline": 8}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import DDIMScheduler

    name = pipeline_class or SD.pipelines[0]
    return tiny_around({**TINY, "in_channels": TINY_CHANNELS.get(name, 4)}, DDIMScheduler, name)


def tiny_around(unet_config: Mapping[str, Any], scheduler: type, pipeline_class: str) -> DiffusionPipeline:
    """The tiny pipeline around a UNet of the Stable Diffusion 1 kind."""
    from diffusers import UNet2DConditionModel

    from vivace.families.tokenizers import clip_image_processor, clip_tokenizer

    unet = cache(lambda: UNet2DConditionModel(**unet_config))
    return small.assemble(
        pipeline_class,
        {
            "vae": small.autoencoder_kl,
            "text_encoder": small.clip_text,
            "tokenizer": clip_tokenizer,
            "unet": unet,
            "scheduler": lambda: scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            "controlnet": lambda: small.controlnet(unet()),
            "adapter": lambda: small.t2i_adapter(unet(), kind="full_adapter", downscale=8),
            "image_encoder": small.clip_vision,
            "feature_extractor": clip_image_processor,
            "safety_checker": lambda: None,
            "requires_safety_checker": lambda: False,
        },
    )


def recognise(config: Mapping[str, Any]) -> bool:
    """No condition beside time and text."""
    return config["addition_embed_type"] is None and config["time_cond_proj_dim"] is None


SD = Family(
    name="sd",
    title="Stable Diffusion 1.5 and 2.1",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
    ),
    denoisers=("unet",),
    denoiser_class="UNet2DConditionModel",
    vae_class="AutoencoderKL",
    vae=SD_VAE,
    scheduler=("PNDMScheduler", {**SD_NOISE, "skip_prk_steps": True, "set_alpha_to_one": False}),
    blocks=BLOCKS,
    guidance="batched",
    prediction="epsilon",
    keep_16bit=KEEP_16BIT,
    variants={
        "1.5": Variant(
            denoiser=SD15,
            parameters=859_520_964,
            hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
            size=(512, 512),
            steps=50,
            guidance=7.5,
            batch=2,
        ),
        "1.5-inpaint": Variant(
            denoiser={**SD15, "in_channels": 9},
            parameters=859_535_364,
            hub_id="stable-diffusion-v1-5/stable-diffusion-inpainting",
            pipeline="StableDiffusionInpaintPipeline",
            size=(512, 512),
            steps=50,
            guidance=7.5,
            batch=2,
        ),
        "2.1": Variant(
            denoiser=SD21,
            text_encoders=SD2_TEXT,
            parameters=865_910_724,
            hub_id="stabilityai/stable-diffusion-2-1",
            size=(768, 768),
            steps=50,
            guidance=7.5,
            batch=2,
            prediction="v",
            scheduler={"prediction_type": "v_prediction"},
        ),
        "turbo": Variant(
            denoiser={**SD21, "sample_size": 64},
            text_encoders=SD2_TEXT,
            parameters=865_910_724,
            hub_id="stabilityai/sd-turbo",
            size=(512, 512),
            steps=1,
            guidance=0.0,
            guidance_kind="none",
        ),
    },
    text_encoders={"text_encoder": CLIP_L},
    recognise=recognise,
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=8,
    takes=frozenset({"prompt", "negative", "guidance", "image", "mask", "strength", "control"}),
    single_file=True,
)
