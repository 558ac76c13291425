"""Stable Diffusion XL (arXiv 2307.01952), its turbo and LCM distillations, and the pruned SSD-1B (arXiv 2401.02677)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.published import CLIP_L, OPENCLIP_BIG_G, SD_NOISE, SDXL_VAE
from vivace.families.unet import BLOCKS, KEEP_16BIT, inputs, split
from vivace.family import Family, Variant

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Three levels instead of four: the costly first one has no attention.
LEVELS: Mapping[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
BASE: Mapping[str, Any] = {
    **LEVELS,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # counts of heads, in spite of the name
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SSD_1B: Mapping[str, Any] = {
    **BASE,
    "transformer_layers_per_block": (1, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
}

TINY: Mapping[str, Any] = {
    **LEVELS,
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 2 * small.WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + small.WIDTH,
}
# Pix2Pix sees the picture it edits beside the noise.
TINY_CHANNELS = {"StableDiffusionXLInstructPix2PixPipeline": 8}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    from vivace.families.tokenizers import clip_image_processor, clip_tokenizer

    name = pipeline_class or SDXL.pipelines[0]
    unet = cache(lambda: UNet2DConditionModel(**TINY, in_channels=TINY_CHANNELS.get(name, 4)))
    return small.assemble(
        name,
        {
            "vae": lambda: small.autoencoder_kl(scaling_factor=0.13025),
            "text_encoder": small.clip_text,
            "text_encoder_2": small.clip_text_projected,
            "tokenizer": clip_tokenizer,
            "tokenizer_2": clip_tokenizer,
            "unet": unet,
            "scheduler": lambda: EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            "controlnet": lambda: (small.controlnet_union if "Union" in name else small.controlnet)(unet()),
            "adapter": lambda: small.t2i_adapter(unet(), kind="full_adapter_xl", downscale=16),
            "image_encoder": small.clip_vision,
            "feature_extractor": clip_image_processor,
            "add_watermarker": lambda: False,
        },
    )


def recognise(config: Mapping[str, Any]) -> bool:
    """Pooled text and picture size are embedded beside the time."""
    return config["addition_embed_type"] == "text_time"


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    ),
    denoisers=("unet",),
    denoiser_class="UNet2DConditionModel",
    vae_class="AutoencoderKL",
    vae=SDXL_VAE,
    scheduler=("EulerDiscreteScheduler", {**SD_NOISE, "timestep_spacing": "leading"}),
    blocks=BLOCKS,
    guidance="batched",
    prediction="epsilon",
    keep_16bit=KEEP_16BIT,
    variants={
        "base": Variant(
            denoiser=BASE,
            parameters=2_567_463_684,
            hub_id="stabilityai/stable-diffusion-xl-base-1.0",
            steps=50,
            batch=2,
        ),
        "inpaint": Variant(
            denoiser={**BASE, "in_channels": 9},
            parameters=2_567_478_084,
            hub_id="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
            pipeline="StableDiffusionXLInpaintPipeline",
            steps=50,
            batch=2,
        ),
        "turbo": Variant(
            denoiser={**BASE, "sample_size": 64},
            parameters=2_567_463_684,
            hub_id="stabilityai/sdxl-turbo",
            size=(512, 512),
            steps=1,
            guidance=0.0,
            guidance_kind="none",
            scheduler={"timestep_spacing": "trailing"},
        ),
        "lcm": Variant(
            denoiser={**BASE, "time_cond_proj_dim": 256},
            parameters=2_567_545_604,
            hub_id="latent-consistency/lcm-sdxl",
            steps=4,
            guidance=8.0,
            guidance_kind="embedded",
        ),
        "ssd-1b": Variant(
            denoiser=SSD_1B,
            parameters=1_331_334_404,
            hub_id="segmind/SSD-1B",
            steps=50,
            guidance=9.0,
            batch=2,
        ),
    },
    text_encoders={"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIG_G},
    recognise=recognise,
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=8,
    takes=frozenset({"prompt", "negative", "guidance", "image", "mask", "strength", "control"}),
    single_file=True,
)
