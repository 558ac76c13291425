"""FLUX.1: dev, schnell, Krea, Kontext, Fill and the Control models (Black Forest Labs, 2024 and 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for, only_stills
from vivace.families.published import CLIP_L, FLUX_VAE, T5_XXL
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, FluxTransformer2DModel

SCHNELL: Mapping[str, Any] = {"guidance_embeds": False}  # else the defaults of the class
DEV: Mapping[str, Any] = {"guidance_embeds": True}
FILL: Mapping[str, Any] = {**DEV, "in_channels": 384, "out_channels": 64}  # sees masked picture and mask
CONTROL: Mapping[str, Any] = {**DEV, "in_channels": 128, "out_channels": 64}  # sees an edge or depth picture

TINY: Mapping[str, Any] = {
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": small.WIDTH,
    "pooled_projection_dim": small.WIDTH,
    "guidance_embeds": True,
}
TINY_CHANNELS = {
    "FluxFillPipeline": 384,
    "FluxControlPipeline": 128,
    "FluxControlImg2ImgPipeline": 128,
    "FluxControlInpaintPipeline": 128,
}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel

    from vivace.families.tokenizers import clip_image_processor, clip_tokenizer, t5_tokenizer

    name = pipeline_class or FLUX.pipelines[0]
    config = {**TINY, "in_channels": TINY_CHANNELS.get(name, TINY["in_channels"])}
    control = {key: value for key, value in TINY.items() if key != "out_channels"}
    return small.assemble(
        name,
        {
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            "vae": lambda: small.autoencoder_kl(
                channels=16, scaling_factor=FLUX_VAE["scaling_factor"], shift_factor=FLUX_VAE["shift_factor"]
            ),
            "text_encoder": small.clip_text,
            "tokenizer": clip_tokenizer,
            "text_encoder_2": small.t5_encoder,
            "tokenizer_2": t5_tokenizer,
            "transformer": lambda: FluxTransformer2DModel(**config),
            "controlnet": lambda: small.without_zeros(FluxControlNetModel(**control)),
            "image_encoder": small.clip_vision,
            "feature_extractor": clip_image_processor,
        },
    )


def split(transformer: FluxTransformer2DModel) -> Split:
    """The stock computation: the blocks with a stream each for text and picture, then those with a joint one."""
    double = [
        Block(name=f"transformer_blocks.{i}", module=block, forward=partial(_block, block, i, "control"))
        for i, block in enumerate(transformer.transformer_blocks)
    ]
    single = [
        Block(name=f"single_transformer_blocks.{i}", module=block, forward=partial(_block, block, i, "single_control"))
        for i, block in enumerate(transformer.single_transformer_blocks)
    ]
    return Split(
        prologue=partial(_prologue, transformer),
        blocks=(*double, *single),
        epilogue=partial(_epilogue, transformer),
    )


def _prologue(
    transformer: Any,
    *,
    hidden_states: torch.Tensor,  # [B, S, C], patches of 2 x 2 latent positions
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    pooled_projections: torch.Tensor,  # [B, D]
    timestep: torch.Tensor,  # [B], 0 to 1
    img_ids: torch.Tensor,  # [S, 3]
    txt_ids: torch.Tensor,  # [T, 3]
    guidance: torch.Tensor | None = None,  # [B]
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: list[torch.Tensor] | None = None,
    controlnet_single_block_samples: list[torch.Tensor] | None = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
) -> State:
    import torch

    attention, scale = take_lora_scale(joint_attention_kwargs)
    with lora_scaled(transformer, scale):
        x = transformer.x_embedder(hidden_states)
        scalars = [1000 * value.to(x.dtype) for value in (timestep, guidance) if value is not None]
        temb = transformer.time_text_embed(*scalars, pooled_projections)
        text = transformer.context_embedder(encoder_hidden_states)
        # positions once had a batch dimension
        ids = torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])
        rope = transformer.pos_embed(ids)
        if attention is not None and "ip_adapter_image_embeds" in attention:
            attention["ip_hidden_states"] = transformer.encoder_hid_proj(attention.pop("ip_adapter_image_embeds"))
    context = {
        "block": {"temb": temb, "image_rotary_emb": rope, "joint_attention_kwargs": attention},
        "control": spread(controlnet_block_samples, transformer.transformer_blocks, repeat=controlnet_blocks_repeat),
        "single_control": spread(controlnet_single_block_samples, transformer.single_transformer_blocks),
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(x, text=text, context=context)


def spread(
    residuals: list[torch.Tensor] | None, blocks: torch.nn.ModuleList, *, repeat: bool = False
) -> list[torch.Tensor] | None:
    """One control residual a block: neighbours share one, or with `repeat` the list goes round."""
    if residuals is None:
        return None
    interval = ceil(len(blocks) / len(residuals))
    return [residuals[i % len(residuals) if repeat else i // interval] for i in range(len(blocks))]


def _block(block: torch.nn.Module, index: int, control: str, state: State) -> State:
    context = state.context
    with lora_scaled(block, context["lora_scale"]):
        text, x = block(hidden_states=state.x, encoder_hidden_states=state.text, **context["block"])
    if context[control] is not None:
        x = x + context[control][index]
    return replace(state, x=x, text=text)


def _epilogue(transformer: Any, state: State) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    with lora_scaled(transformer, state.context["lora_scale"]):
        x = transformer.proj_out(transformer.norm_out(state.x, state.context["block"]["temb"]))
    return Transformer2DModelOutput(sample=x) if state.context["return_dict"] else (x,)


def signal(transformer: Any, state: State) -> torch.Tensor:
    """The first block's modulated input: [B, S, D]."""
    return transformer.transformer_blocks[0].norm1(state.x, emb=state.context["block"]["temb"])[0]


def inputs(
    transformer: FluxTransformer2DModel,
    *,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 1,
    frames: int = 1,
    text_tokens: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the model's device and dtype.

    `frames` has no meaning for pictures and must be 1.
    """
    import torch

    only_stills("FLUX.1", frames)
    config: Any = transformer.config
    device, dtype = transformer.device, transformer.dtype
    noise = noise_for(transformer, seed=seed)
    rows, columns = size[1] // 16, size[0] // 16
    positions = torch.cartesian_prod(*(torch.arange(n, device=device, dtype=dtype) for n in (1, rows, columns)))
    return {
        "hidden_states": noise(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": noise(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": positions,
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
        "guidance": torch.full((batch,), 4.0, device=device) if config.guidance_embeds else None,
        "return_dict": False,
    }


dev = partial(Variant, denoiser=DEV, parameters=11_901_408_320, text_tokens=512)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    denoisers=("transformer",),
    denoiser_class="FluxTransformer2DModel",
    vae_class="AutoencoderKL",
    vae=FLUX_VAE,
    scheduler=(
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    ),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    guidance="embedded",
    prediction="flow",
    keep_16bit=("x_embedder", "context_embedder", "time_text_embed.*", "proj_out"),
    one_row=("*.norm*.linear", "norm_out.linear"),
    variants={
        "dev": dev(
            hub_id="black-forest-labs/FLUX.1-dev",
            guidance=3.5,
            teacache=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        ),
        "schnell": Variant(
            denoiser=SCHNELL,
            parameters=11_891_178_560,
            hub_id="black-forest-labs/FLUX.1-schnell",
            scheduler={"use_dynamic_shifting": False, "shift": 1.0},
            steps=4,
            guidance=0.0,
            guidance_kind="none",
            text_tokens=256,
        ),
        "krea": dev(hub_id="black-forest-labs/FLUX.1-Krea-dev", guidance=4.5),
        "kontext": dev(hub_id="black-forest-labs/FLUX.1-Kontext-dev", pipeline="FluxKontextPipeline", guidance=2.5),
        "fill": Variant(
            denoiser=FILL,
            parameters=11_902_391_360,
            hub_id="black-forest-labs/FLUX.1-Fill-dev",
            pipeline="FluxFillPipeline",
            steps=50,
            guidance=30.0,
            text_tokens=512,
        ),
        "canny": Variant(
            denoiser=CONTROL,
            parameters=11_901_604_928,
            hub_id="black-forest-labs/FLUX.1-Canny-dev",
            pipeline="FluxControlPipeline",
            steps=50,
            guidance=30.0,
            text_tokens=512,
        ),
        "depth": Variant(
            denoiser=CONTROL,
            parameters=11_901_604_928,
            hub_id="black-forest-labs/FLUX.1-Depth-dev",
            pipeline="FluxControlPipeline",
            steps=30,
            guidance=10.0,
            text_tokens=512,
        ),
    },
    text_encoders={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    split=split,
    tiny=tiny,
    inputs=inputs,
    signal=signal,
    multiple=16,
    takes=frozenset({"prompt", "negative", "guidance", "true_cfg", "image", "mask", "strength", "control"}),
    single_file=True,
    shared=frozenset({"img_ids", "txt_ids"}),
)
