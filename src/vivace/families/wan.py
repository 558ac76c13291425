"""Wan 2.1 (arXiv 2503.20314) and Wan 2.2: videos from text, from a picture, from a video.

Wan 2.2 A14B has two experts of one shape: `transformer` for the noisy steps, `transformer_2` for the others. Elsewhere
`transformer_2` is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from vivace.errors import InputError
from vivace.families import tiny as small
from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for
from vivace.families.published import OPENCLIP_H_VISION, T5_XXL
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, WanTransformer3DModel
    from transformers import CLIPVisionModel, UMT5EncoderModel

T2V_14B: Mapping[str, Any] = {}  # the defaults of the class
T2V_1_3B: Mapping[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
I2V_14B: Mapping[str, Any] = {"in_channels": 36}  # noise, the latents of the picture, and 4 channels of mask
I2V_14B_CLIP: Mapping[str, Any] = {**I2V_14B, "image_dim": 1280, "added_kv_proj_dim": 5120}
TI2V_5B: Mapping[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
}
# Wan 2.2's denser autoencoder: 16 pixels a side become one position of 48 channels.
VAE_48: Mapping[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": (0.0,) * 48,
    "latents_std": (1.0,) * 48,
}
UMT5_XXL = ("UMT5EncoderModel", {**T5_XXL[1], "vocab_size": 256384})
CLIP_H_VISION = ("CLIPVisionModel", OPENCLIP_H_VISION[1])

TINY: Mapping[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": small.WIDTH,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
TINY_CLIP = {**TINY, "in_channels": 36, "image_dim": small.WIDTH, "added_kv_proj_dim": 32}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels and 5 frames on the CPU.

    Text to video has two experts, as Wan 2.2 A14B; picture to video sees a CLIP embedding, as Wan 2.1.
    """
    from diffusers import WanTransformer3DModel

    from vivace.families.tokenizers import clip_image_processor

    name = pipeline_class or WAN.pipelines[0]
    from_picture = name == "WanImageToVideoPipeline"
    two_experts = name == "WanPipeline"
    config = TINY_CLIP if from_picture else TINY
    return small.assemble(
        name,
        {
            **tiny_surroundings(),
            "transformer": lambda: WanTransformer3DModel(**config),
            "transformer_2": lambda: WanTransformer3DModel(**config) if two_experts else None,
            "boundary_ratio": lambda: 0.875 if two_experts else None,
            "image_encoder": _tiny_image_encoder,
            "image_processor": clip_image_processor,
        },
    )


def tiny_surroundings() -> dict[str, Callable[[], Any]]:
    """Builders of what every tiny pipeline of Wan has around its denoisers."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    from vivace.families.tokenizers import t5_tokenizer

    return {
        "tokenizer": t5_tokenizer,
        "text_encoder": _tiny_text_encoder,
        "vae": lambda: AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _tiny_text_encoder() -> UMT5EncoderModel:
    from transformers import UMT5Config, UMT5EncoderModel

    from vivace.families.tokenizers import t5_tokenizer

    config = UMT5Config(
        vocab_size=len(t5_tokenizer()), d_model=small.WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2
    )
    return UMT5EncoderModel(config)


def _tiny_image_encoder() -> CLIPVisionModel:
    from transformers import CLIPVisionModel

    return CLIPVisionModel(small.clip_vision().config)


def split(transformer: WanTransformer3DModel) -> Split:
    """The stock computation of one expert, one step a block."""
    blocks = tuple(
        Block(name=f"blocks.{i}", module=block, forward=partial(_block, block))
        for i, block in enumerate(transformer.blocks)
    )
    return Split(prologue=partial(prologue, transformer), blocks=blocks, epilogue=partial(epilogue, transformer))


def prologue(
    transformer: Any,
    *,
    hidden_states: torch.Tensor,  # [B, C, F, H, W]
    timestep: torch.Tensor,  # [B], or [B, S] where each position has its own (TI2V), 0 to 1000
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    encoder_hidden_states_image: torch.Tensor | None = None,  # [B, I, D]
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> State:
    """Everything before the blocks: patches, positions, and the embeddings of time, text and picture."""
    import torch

    _, scale = take_lora_scale(attention_kwargs)
    own_times = timestep.shape[1] if timestep.ndim == 2 else None
    with lora_scaled(transformer, scale):
        rope = transformer.rope(hidden_states)
        x = transformer.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, S, D]
        temb, modulation, text, image = transformer.condition_embedder(
            timestep.flatten() if own_times else timestep,
            encoder_hidden_states,
            encoder_hidden_states_image,
            timestep_seq_len=own_times,
        )
    context = {
        "text": text if image is None else torch.cat([image, text], dim=1),
        "modulation": modulation.unflatten(-1, (6, -1)),  # [B, 6, D] or [B, S, 6, D]
        "rope": rope,
        "temb": temb,
        "grid": grid(transformer, {"hidden_states": hidden_states}),
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(x, context=context)


def _block(block: torch.nn.Module, state: State) -> State:
    context = state.context
    with lora_scaled(block, context["lora_scale"]):
        return replace(state, x=block(state.x, context["text"], context["modulation"], context["rope"]))


def epilogue(transformer: Any, state: State) -> Any:
    """The output layers, and the video [B, C, F, H, W] put together again."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    context, x = state.context, state.x
    table, temb = transformer.scale_shift_table, context["temb"]
    if temb.ndim == 3:
        shift, scale = (table.to(temb.device)[None] + temb.unsqueeze(2)).unbind(2)
    else:
        shift, scale = (table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
    with lora_scaled(transformer, context["lora_scale"]):
        x = (transformer.norm_out(x.float()) * (1 + scale.to(x.device)) + shift.to(x.device)).type_as(x)
        x = video_of(transformer, transformer.proj_out(x), grid=context["grid"])
    return Transformer2DModelOutput(sample=x) if context["return_dict"] else (x,)


def grid(transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of patches in a call."""
    sides = zip(kwargs["hidden_states"].shape[2:], transformer.config.patch_size, strict=True)
    frames, rows, columns = (side // step for side, step in sides)
    return frames, rows, columns


def video_of(transformer: Any, x: torch.Tensor, *, grid: tuple[int, ...]) -> torch.Tensor:
    """The video [B, C, F, H, W] whose patches, in a `grid`, are the rows of `x` [B, S, patch C]."""
    x = x.unflatten(1, grid).unflatten(-1, (*transformer.config.patch_size, -1))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def signal(transformer: Any, state: State) -> torch.Tensor:
    """The projected embedding of time: [B, 6, D] or [B, S, 6, D]."""
    return state.context["modulation"]


def inputs(
    transformer: WanTransformer3DModel,
    *,
    size: tuple[int, int] = (832, 480),
    batch: int = 1,
    frames: int = 81,
    text_tokens: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the model's device and dtype.

    `frames` is one more than a multiple of 4, as the autoencoder packs four after the first; else InputError.
    """
    import torch

    if frames % 4 != 1:
        raise InputError(f"Wan makes 4 n + 1 frames, got {frames}; pass {frames // 4 * 4 + 1}")
    config: Any = transformer.config
    noise = noise_for(transformer, seed=seed)
    dense = config.out_channels == TI2V_5B["out_channels"]  # of the two autoencoders
    pixels = 16 if dense else 8
    shape = (1 + frames // 4, size[1] // pixels, size[0] // pixels)
    tokens = prod(side // step for side, step in zip(shape, config.patch_size, strict=True))
    return {
        "hidden_states": noise(batch, config.in_channels, *shape),
        "timestep": torch.full((batch, tokens) if dense else (batch,), 500.0, device=transformer.device),
        "encoder_hidden_states": noise(batch, text_tokens, config.text_dim),
        "encoder_hidden_states_image": noise(batch, 257, config.image_dim) if config.image_dim else None,
        "return_dict": False,
    }


video = partial(Variant, size=(1280, 720), frames=81, steps=50, text_tokens=512)

# TeaCache polynomials are for the projected time embedding as the signal.
WAN = Family(
    name="wan",
    title="Wan 2.1 and 2.2",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    # Its denoiser sees the picture in channels of its own, unless each frame has a timestep of its own (TI2V 5B).
    only_with={"WanImageToVideoPipeline": "expand_timesteps"},
    denoisers=("transformer", "transformer_2"),
    denoiser_class="WanTransformer3DModel",
    vae_class="AutoencoderKLWan",
    blocks=("blocks",),
    guidance="two_calls",
    prediction="flow",
    keep_16bit=("patch_embedding", "condition_embedder.*", "proj_out"),
    variants={
        "2.1-t2v-1.3b": video(
            denoiser=T2V_1_3B,
            parameters=1_418_996_800,
            hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            size=(832, 480),
            teacache=(-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
        ),
        "2.1-t2v-14b": video(
            denoiser=T2V_14B,
            parameters=14_288_491_584,
            hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            teacache=(-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
        ),
        "2.1-i2v-14b-480p": video(
            denoiser=I2V_14B_CLIP,
            text_encoders={"image_encoder": CLIP_H_VISION},
            parameters=16_394_878_784,
            hub_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            pipeline="WanImageToVideoPipeline",
            size=(832, 480),
            teacache=(257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
        ),
        "2.1-i2v-14b-720p": video(
            denoiser=I2V_14B_CLIP,
            text_encoders={"image_encoder": CLIP_H_VISION},
            parameters=16_394_878_784,
            hub_id="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            pipeline="WanImageToVideoPipeline",
            teacache=(8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
        ),
        "2.2-t2v-a14b": video(
            denoiser=T2V_14B,
            parameters=14_288_491_584,
            hub_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            experts=2,
            steps=40,
            guidance=4.0,
        ),
        "2.2-i2v-a14b": video(
            denoiser=I2V_14B,
            parameters=14_288_901_184,
            hub_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            pipeline="WanImageToVideoPipeline",
            experts=2,
            steps=40,
            guidance=3.5,
        ),
        "2.2-ti2v-5b": video(
            denoiser=TI2V_5B,
            vae=VAE_48,
            parameters=4_999_787_712,
            hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            size=(1280, 704),
            multiple=32,
            frames=121,
        ),
    },
    text_encoders={"text_encoder": UMT5_XXL},
    split=split,
    tiny=tiny,
    inputs=inputs,
    signal=signal,
    grid=grid,
    multiple=16,
    packed=4,
    media="video",
    takes=frozenset({"prompt", "negative", "guidance", "image", "strength"}),
)
