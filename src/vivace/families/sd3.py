"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), and the built-in model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for, only_stills
from vivace.families.published import CLIP_L_PROJECTED, OPENCLIP_BIG_G, SD3_VAE, T5_XXL
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SD3Transformer2DModel

MEDIUM: Mapping[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
MEDIUM_35: Mapping[str, Any] = {
    **MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE_35: Mapping[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
TEXT_TOKENS = 77 + 256  # of the two CLIPs, which share positions, and of T5

TINY: Mapping[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 2 * small.WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * small.WIDTH,
    "pos_embed_max_size": 64,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU; two CLIPs and no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

    from vivace.families.tokenizers import clip_tokenizer

    name = pipeline_class or SD3.pipelines[0]
    # beside the latents of the picture, the inpainting ControlNet sees the mask
    extra = 1 if name == "StableDiffusion3ControlNetInpaintingPipeline" else 0
    return small.assemble(
        name,
        {
            "transformer": lambda: SD3Transformer2DModel(**TINY),
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": lambda: small.autoencoder_kl(
                channels=16, scaling_factor=SD3_VAE["scaling_factor"], shift_factor=SD3_VAE["shift_factor"]
            ),
            "text_encoder": small.clip_text_projected,
            "tokenizer": clip_tokenizer,
            "text_encoder_2": small.clip_text_projected,
            "tokenizer_2": clip_tokenizer,
            "text_encoder_3": lambda: None,
            "tokenizer_3": lambda: None,
            "controlnet": lambda: small.without_zeros(
                SD3ControlNetModel(**{**TINY, "num_layers": 2}, extra_conditioning_channels=extra)
            ),
        },
    )


def split(transformer: SD3Transformer2DModel) -> Split:
    """The stock computation, one step a joint block."""
    blocks = tuple(
        Block(name=f"transformer_blocks.{i}", module=block, forward=partial(_block, block, i))
        for i, block in enumerate(transformer.transformer_blocks)
    )
    return Split(prologue=partial(_prologue, transformer), blocks=blocks, epilogue=partial(_epilogue, transformer))


def _prologue(
    transformer: Any,
    *,
    hidden_states: torch.Tensor,  # [B, C, H, W]
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    pooled_projections: torch.Tensor,  # [B, D]
    timestep: torch.Tensor,  # [B], 0 to 1000
    block_controlnet_hidden_states: list[torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    skip_layers: list[int] | None = None,
) -> State:
    attention, scale = take_lora_scale(joint_attention_kwargs)
    with lora_scaled(transformer, scale):
        x = transformer.pos_embed(hidden_states).contiguous()  # [B, S, D]
        temb = transformer.time_text_embed(timestep, pooled_projections)
        text = transformer.context_embedder(encoder_hidden_states)
        if attention is not None and "ip_adapter_image_embeds" in attention:
            images, images_temb = transformer.image_proj(attention.pop("ip_adapter_image_embeds"), timestep)
            attention.update(ip_hidden_states=images, temb=images_temb)
    patch = transformer.config.patch_size
    context = {
        "block": {"temb": temb, "joint_attention_kwargs": attention},
        "control": spread(block_controlnet_hidden_states, transformer.transformer_blocks),
        "skip_layers": skip_layers or (),
        "grid": (hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch),
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(x, text=text, context=context)


def spread(residuals: list[torch.Tensor] | None, blocks: torch.nn.ModuleList) -> list[torch.Tensor | None] | None:
    """One control residual a block, shared by neighbours; none after the last block, which drops the text."""
    if residuals is None:
        return None
    interval = len(blocks) / len(residuals)
    return [None if block.context_pre_only else residuals[int(i / interval)] for i, block in enumerate(blocks)]


def _block(block: torch.nn.Module, index: int, state: State) -> State:
    context, text, x = state.context, state.text, state.x
    if index not in context["skip_layers"]:
        with lora_scaled(block, context["lora_scale"]):
            text, x = block(hidden_states=x, encoder_hidden_states=text, **context["block"])
    residual = None if context["control"] is None else context["control"][index]
    return replace(state, x=x if residual is None else x + residual, text=text)


def _epilogue(transformer: Any, state: State) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    with lora_scaled(transformer, state.context["lora_scale"]):
        x = transformer.proj_out(transformer.norm_out(state.x, state.context["block"]["temb"]))
    patch = transformer.config.patch_size
    x = x.unflatten(1, state.context["grid"]).unflatten(-1, (patch, patch, transformer.out_channels))
    x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, H, W, P, Q, C] to [B, C, H P, W Q]
    return Transformer2DModelOutput(sample=x) if state.context["return_dict"] else (x,)


def signal(transformer: Any, state: State) -> torch.Tensor:
    """The first block's modulated input: [B, S, D]."""
    return transformer.transformer_blocks[0].norm1(state.x, emb=state.context["block"]["temb"])[0]


def inputs(
    transformer: SD3Transformer2DModel,
    *,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 2,
    frames: int = 1,
    text_tokens: int = TEXT_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the model's device and dtype.

    `frames` has no meaning for pictures and must be 1.
    """
    import torch

    only_stills("Stable Diffusion 3", frames)
    config: Any = transformer.config
    noise = noise_for(transformer, seed=seed)
    return {
        "hidden_states": noise(batch, config.in_channels, size[1] // 8, size[0] // 8),
        "encoder_hidden_states": noise(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0, device=transformer.device),
        "return_dict": False,
    }


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
    denoisers=("transformer",),
    largest=lambda transformer: 8 * transformer.config.patch_size * transformer.config.pos_embed_max_size,
    denoiser_class="SD3Transformer2DModel",
    vae_class="AutoencoderKL",
    vae=SD3_VAE,
    blocks=("transformer_blocks",),
    guidance="batched",
    prediction="flow",
    keep_16bit=("pos_embed.*", "context_embedder", "time_text_embed.*", "proj_out"),
    one_row=("*.norm*.linear", "norm_out.linear"),
    variants={
        "3.5-medium": Variant(
            denoiser=MEDIUM_35,
            parameters=2_243_171_520,
            hub_id="stabilityai/stable-diffusion-3.5-medium",
            steps=40,
            guidance=4.5,
            text_tokens=TEXT_TOKENS,
            batch=2,
        ),
        "3.5-large": Variant(
            denoiser=LARGE_35,
            parameters=8_056_627_520,
            hub_id="stabilityai/stable-diffusion-3.5-large",
            guidance=3.5,
            text_tokens=TEXT_TOKENS,
            batch=2,
            teacache=(50251.6305, -17135.0998, 1812.47682, -69.9267532, 0.939706146),
        ),
        "3.5-large-turbo": Variant(
            denoiser=LARGE_35,
            parameters=8_056_627_520,
            hub_id="stabilityai/stable-diffusion-3.5-large-turbo",
            steps=4,
            guidance=0.0,
            guidance_kind="none",
            text_tokens=TEXT_TOKENS,
        ),
        "3-medium": Variant(
            denoiser=MEDIUM,
            parameters=2_028_328_000,
            hub_id="stabilityai/stable-diffusion-3-medium-diffusers",
            guidance=7.0,
            text_tokens=TEXT_TOKENS,
            batch=2,
        ),
    },
    text_encoders={"text_encoder": CLIP_L_PROJECTED, "text_encoder_2": OPENCLIP_BIG_G, "text_encoder_3": T5_XXL},
    split=split,
    tiny=tiny,
    inputs=inputs,
    signal=signal,
    multiple=16,
    takes=frozenset({"prompt", "negative", "guidance", "image", "mask", "strength", "control"}),
    mask_channels=16,
)
