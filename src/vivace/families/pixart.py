"""PixArt-alpha and PixArt-sigma (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.noise import noise_for, only_stills
from vivace.families.published import SD_VAE, SDXL_VAE, T5_XXL
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, PixArtTransformer2DModel

XL_2: Mapping[str, Any] = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
}
TINY: Mapping[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": small.WIDTH,
    "sample_size": 8,
    "use_additional_conditions": False,
}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    from vivace.families.tokenizers import t5_tokenizer

    return small.assemble(
        pipeline_class or PIXART.pipelines[0],
        {
            "tokenizer": t5_tokenizer,
            "text_encoder": small.t5_encoder,
            "vae": small.autoencoder_kl,
            "transformer": lambda: PixArtTransformer2DModel(**TINY),
            "scheduler": DPMSolverMultistepScheduler,
        },
    )


def split(transformer: PixArtTransformer2DModel) -> Split:
    """The stock computation, one step a transformer block."""
    blocks = tuple(
        Block(name=f"transformer_blocks.{i}", module=block, forward=partial(_block, block))
        for i, block in enumerate(transformer.transformer_blocks)
    )
    return Split(prologue=partial(_prologue, transformer), blocks=blocks, epilogue=partial(_epilogue, transformer))


def _prologue(
    transformer: Any,
    *,
    hidden_states: torch.Tensor,  # [B, C, H, W]
    encoder_hidden_states: torch.Tensor,  # [B, S, D]
    timestep: torch.Tensor,  # [B]
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    return_dict: bool = True,
) -> State:
    if transformer.use_additional_conditions and added_cond_kwargs is None:
        raise ValueError("this PixArt embeds size and aspect ratio; pass added_cond_kwargs (resolution, aspect_ratio)")
    batch, patch = len(hidden_states), transformer.config.patch_size
    grid = (hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch)
    x = transformer.pos_embed(hidden_states)  # [B, S, D]
    modulation, embedded = transformer.adaln_single(timestep, added_cond_kwargs, batch_size=batch, hidden_dtype=x.dtype)
    if transformer.caption_projection is not None:
        encoder_hidden_states = transformer.caption_projection(encoder_hidden_states).view(batch, -1, x.shape[-1])
    block = {
        "attention_mask": _bias(attention_mask, hidden_states.dtype),
        "encoder_hidden_states": encoder_hidden_states,
        "encoder_attention_mask": _bias(encoder_attention_mask, hidden_states.dtype),
        "timestep": modulation,
        "cross_attention_kwargs": cross_attention_kwargs,
    }
    return State(x, context={"block": block, "embedded": embedded, "grid": grid, "return_dict": return_dict})


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A keep mask [B, S] as a bias on attention scores [B, 1, S]; a bias stays one."""
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1) if mask is not None and mask.ndim == 2 else mask


def _block(block: torch.nn.Module, state: State) -> State:
    return replace(state, x=block(state.x, class_labels=None, **state.context["block"]))


def _epilogue(transformer: Any, state: State) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    table = transformer.scale_shift_table
    shift, scale = (table[None] + state.context["embedded"][:, None].to(table.device)).chunk(2, dim=1)
    x = transformer.norm_out(state.x) * (1 + scale) + shift
    x = picture_of(transformer, transformer.proj_out(x), grid=state.context["grid"])
    return Transformer2DModelOutput(sample=x) if state.context["return_dict"] else (x,)


def picture_of(transformer: Any, x: torch.Tensor, *, grid: tuple[int, ...]) -> torch.Tensor:
    """The picture [B, C, H, W] whose patches, in a `grid`, are the rows of `x` [B, S, patch C]."""
    patch = transformer.config.patch_size
    x = x.unflatten(1, grid).unflatten(-1, (patch, patch, transformer.out_channels))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def inputs(
    transformer: PixArtTransformer2DModel,
    *,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 2,
    frames: int = 1,
    text_tokens: int = 300,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the model's device and dtype.

    `frames` has no meaning for pictures and must be 1.
    """
    import torch

    only_stills("PixArt", frames)
    config: Any = transformer.config
    device, dtype = transformer.device, transformer.dtype
    noise = noise_for(transformer, seed=seed)
    width, height = size
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        conditions["resolution"] = torch.tensor([[height, width]], device=device, dtype=dtype).expand(batch, -1)
        conditions["aspect_ratio"] = torch.tensor([[height / width]], device=device, dtype=dtype).expand(batch, -1)
    return {
        "hidden_states": noise(batch, config.in_channels, height // 8, width // 8),
        "encoder_hidden_states": noise(batch, text_tokens, config.caption_channels),
        "timestep": torch.full((batch,), 500, device=device),
        "added_cond_kwargs": conditions,
        "encoder_attention_mask": torch.ones(batch, text_tokens, device=device, dtype=dtype),
        "return_dict": False,
    }


PIXART = Family(
    name="pixart",
    title="PixArt alpha and sigma",
    pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline", "PixArtSigmaPAGPipeline"),
    denoisers=("transformer",),
    denoiser_class="PixArtTransformer2DModel",
    vae_class="AutoencoderKL",
    vae=SDXL_VAE,
    blocks=("transformer_blocks",),
    guidance="batched",
    prediction="epsilon",
    keep_16bit=("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out"),
    variants={
        "sigma": Variant(
            denoiser={**XL_2, "use_additional_conditions": False},
            parameters=610_856_096,
            hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            steps=20,
            guidance=4.5,
            text_tokens=300,
            batch=2,
        ),
        "sigma-2k": Variant(
            denoiser={**XL_2, "sample_size": 256, "use_additional_conditions": False},
            parameters=610_856_096,
            hub_id="PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
            size=(2048, 2048),
            steps=20,
            guidance=4.5,
            text_tokens=300,
            batch=2,
        ),
        "alpha": Variant(
            denoiser={**XL_2, "use_additional_conditions": True},
            vae=SD_VAE,
            parameters=611_349_152,
            hub_id="PixArt-alpha/PixArt-XL-2-1024-MS",
            pipeline="PixArtAlphaPipeline",
            steps=20,
            guidance=4.5,
            text_tokens=120,
            batch=2,
        ),
    },
    text_encoders={"text_encoder": T5_XXL},
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=16,
    takes=frozenset({"prompt", "negative", "guidance"}),
)
