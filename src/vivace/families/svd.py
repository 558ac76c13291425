"""Stable Video Diffusion: a picture becomes a short video (arXiv 2311.15127)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.noise import noise_for
from vivace.families.published import OPENCLIP_H_VISION
from vivace.families.unet import BLOCKS, KEEP_16BIT
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLTemporalDecoder, DiffusionPipeline, UNetSpatioTemporalConditionModel

TINY: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "num_attention_heads": (2, 2, 4, 4),
    "cross_attention_dim": small.WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 2,
}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline for two frames of 64 x 64 pixels on the CPU."""
    from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel

    from vivace.families.tokenizers import clip_image_processor

    return small.assemble(
        pipeline_class or SVD.pipelines[0],
        {
            "vae": _tiny_vae,
            # the pipeline itself resizes the picture to 224 pixels, whatever the encoder
            "image_encoder": lambda: small.clip_vision(image_size=224),
            "unet": lambda: UNetSpatioTemporalConditionModel(**TINY),
            "scheduler": lambda: EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                interpolation_type="linear",
                prediction_type="v_prediction",
                sigma_max=700.0,
                sigma_min=0.002,
                steps_offset=1,
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
            ),
            "feature_extractor": lambda: clip_image_processor(size=224),
        },
    )


def _tiny_vae() -> AutoencoderKLTemporalDecoder:
    from diffusers import AutoencoderKLTemporalDecoder

    config: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (32,) * 4}
    return AutoencoderKLTemporalDecoder(**config, layers_per_block=1, sample_size=64, force_upcast=False)


def split(unet: UNetSpatioTemporalConditionModel) -> Split:
    """The stock computation of the video UNet, one step a down, mid or up block."""
    down = [
        Block(name=f"down_blocks.{i}", module=block, forward=partial(_down, block))
        for i, block in enumerate(unet.down_blocks)
    ]
    mid = Block(name="mid_block", module=unet.mid_block, forward=partial(_mid, unet.mid_block))
    last = len(unet.up_blocks) - 1
    up = [
        Block(name=f"up_blocks.{i}", module=block, forward=partial(_up, block, last=i == last))
        for i, block in enumerate(unet.up_blocks)
    ]
    return Split(prologue=partial(_prologue, unet), blocks=(*down, mid, *up), epilogue=partial(_epilogue, unet))


def _prologue(
    unet: Any,
    *,
    sample: torch.Tensor,  # [B, F, C, H, W]
    timestep: torch.Tensor | float | int,
    encoder_hidden_states: torch.Tensor,  # [B, 1, D]
    added_time_ids: torch.Tensor,  # [B, 3]
    return_dict: bool = True,
) -> State:
    import torch

    batch, frames = sample.shape[:2]
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(
            timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64, device=sample.device
        )
    times = timestep.to(sample.device).reshape(-1).expand(batch)
    emb = unet.time_embedding(unet.time_proj(times).to(sample.dtype))
    added = unet.add_time_proj(added_time_ids.flatten()).reshape(batch, -1)
    emb = emb + unet.add_embedding(added.to(emb.dtype))
    x = unet.conv_in(sample.flatten(0, 1))  # [B F, C, H, W]
    context = {
        "emb": emb.repeat_interleave(frames, dim=0),
        "encoder_hidden_states": encoder_hidden_states.repeat_interleave(frames, dim=0),
        "image_only_indicator": torch.zeros(batch, frames, dtype=sample.dtype, device=sample.device),
        # a size the up path would not hit by doubling is read off the skips
        "odd_size": any(side % 2**unet.num_upsamplers for side in sample.shape[-2:]),
        "shape": (batch, frames),
        "return_dict": return_dict,
    }
    return State(x, skips=(x,), context=context)


def _conditions(block: Any, state: State) -> dict[str, torch.Tensor]:
    """What a block reads beside its input."""
    context = state.context
    conditions = {"temb": context["emb"], "image_only_indicator": context["image_only_indicator"]}
    if getattr(block, "has_cross_attention", False):
        conditions["encoder_hidden_states"] = context["encoder_hidden_states"]
    return conditions


def _down(block: Any, state: State) -> State:
    x, skips = block(hidden_states=state.x, **_conditions(block, state))
    return replace(state, x=x, skips=(*state.skips, *skips))


def _mid(block: Any, state: State) -> State:
    return replace(state, x=block(hidden_states=state.x, **_conditions(block, state)))


def _up(block: Any, state: State, *, last: bool) -> State:
    count = len(block.resnets)
    skips, own = state.skips[:-count], state.skips[-count:]
    size = skips[-1].shape[2:] if state.context["odd_size"] and not last else None
    x = block(hidden_states=state.x, res_hidden_states_tuple=own, upsample_size=size, **_conditions(block, state))
    return replace(state, x=x, skips=skips)


def _epilogue(unet: Any, state: State) -> Any:
    from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput

    x = unet.conv_out(unet.conv_act(unet.conv_norm_out(state.x))).unflatten(0, state.context["shape"])
    return UNetSpatioTemporalConditionOutput(sample=x) if state.context["return_dict"] else (x,)


def inputs(
    unet: UNetSpatioTemporalConditionModel,
    *,
    size: tuple[int, int] = (1024, 576),
    batch: int = 2,
    frames: int = 25,
    text_tokens: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the UNet's device and dtype.

    `text_tokens` counts the tokens of the conditioning picture: 1.
    """
    import torch

    config: Any = unet.config
    device, dtype = unet.device, unet.dtype
    noise = noise_for(unet, seed=seed)
    width, height = (side // 8 for side in size)
    return {
        "sample": noise(batch, frames, config.in_channels, height, width),
        "timestep": torch.tensor(1.0, device=device),
        "encoder_hidden_states": noise(batch, text_tokens, config.cross_attention_dim),
        # frames a second less one, motion bucket, noise on the conditioning picture
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]], device=device, dtype=dtype).expand(batch, -1),
        "return_dict": False,
    }


SVD = Family(
    name="svd",
    title="Stable Video Diffusion",
    pipelines=("StableVideoDiffusionPipeline",),
    denoisers=("unet",),
    denoiser_class="UNetSpatioTemporalConditionModel",
    vae_class="AutoencoderKLTemporalDecoder",
    vae={
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 768,
    },
    blocks=BLOCKS,
    guidance="batched",
    prediction="v",
    # the mix of spatial and temporal paths is one number a block
    keep_16bit=(*KEEP_16BIT, "*.time_mixer", "*.time_pos_embed.*"),
    variants={
        "xt": Variant(
            denoiser={"sample_size": 96, "num_frames": 25},
            parameters=1_524_623_082,
            hub_id="stabilityai/stable-video-diffusion-img2vid-xt",
            size=(1024, 576),
            frames=25,
            steps=25,
            guidance=3.0,
            text_tokens=1,
            batch=2,
        ),
        "img2vid": Variant(
            denoiser={"sample_size": 96, "num_frames": 14},
            parameters=1_524_623_082,
            hub_id="stabilityai/stable-video-diffusion-img2vid",
            size=(1024, 576),
            frames=14,
            steps=25,
            guidance=3.0,
            text_tokens=1,
            batch=2,
        ),
    },
    text_encoders={"image_encoder": OPENCLIP_H_VISION},
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=8,
    media="video",
    takes=frozenset({"image"}),
)
