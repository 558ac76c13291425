"""Configurations of published text encoders and autoencoders that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Encoder = tuple[str, Mapping[str, Any]]  # transformers class name, its configuration

CLIP_L: Encoder = (
    "CLIPTextModel",
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    },
)
CLIP_L_PROJECTED: Encoder = ("CLIPTextModelWithProjection", CLIP_L[1])
OPENCLIP_H: Encoder = (
    "CLIPTextModel",
    # 23 of the 24 layers: Stable Diffusion 2 conditions on the last but one
    {**CLIP_L[1], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    | {"projection_dim": 512, "hidden_act": "gelu"},
)
OPENCLIP_BIG_G: Encoder = (
    "CLIPTextModelWithProjection",
    {**CLIP_L[1], "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    | {"projection_dim": 1280, "hidden_act": "gelu"},
)
OPENCLIP_H_VISION: Encoder = (
    "CLIPVisionModelWithProjection",
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
)
T5_XXL: Encoder = (
    "T5EncoderModel",
    {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
)

# 8 pixels a side become one latent position of 4 channels.
SD_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
SDXL_VAE: Mapping[str, Any] = {**SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

# 16 latent channels and no convolution between them and the posterior: SD 3, FLUX.1 and Z-Image.
SD3_VAE: Mapping[str, Any] = {
    **SD_VAE,
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_VAE: Mapping[str, Any] = {**SD3_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}

# The noise schedule that Stable Diffusion 1, 2 and XL were trained on.
SD_NOISE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

# Qwen 3, whose hidden states condition FLUX.2 klein and Z-Image.
QWEN3_4B: Encoder = (
    "Qwen3ForCausalLM",
    {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
)
QWEN3_8B: Encoder = (
    "Qwen3ForCausalLM",
    {**QWEN3_4B[1], "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
)
