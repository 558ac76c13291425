"""FLUX.2 dev and klein (Black Forest Labs, 2025 and 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for, only_stills
from vivace.families.published import QWEN3_4B, QWEN3_8B
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, Flux2Transformer2DModel
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
    from transformers import Mistral3ForConditionalGeneration

DEV: Mapping[str, Any] = {}  # the defaults of the class
KLEIN_4B: Mapping[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 3 * 2560,
    "guidance_embeds": False,
}
KLEIN_9B: Mapping[str, Any] = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 3 * 4096,
    "guidance_embeds": False,
}
MISTRAL_SMALL_24B = (
    "Mistral3ForConditionalGeneration",
    {
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    },
)

TINY: Mapping[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 32,
    "joint_attention_dim": 3 * small.WIDTH,  # three hidden states of the text encoder side by side
}
# The pipelines read hidden states up to this one.
DEV_TEXT_LAYERS, KLEIN_TEXT_LAYERS = 30, 27


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    from vivace.families.tokenizers import mistral_tokenizer, qwen2_tokenizer

    name = pipeline_class or FLUX2.pipelines[0]
    dev = name == "Flux2Pipeline"
    return small.assemble(
        name,
        {
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            "vae": lambda: AutoencoderKLFlux2(
                block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4
            ),
            "text_encoder": _tiny_mistral if dev else lambda: small.qwen3(layers=KLEIN_TEXT_LAYERS),
            "tokenizer": mistral_tokenizer if dev else qwen2_tokenizer,
            "transformer": lambda: Flux2Transformer2DModel(**TINY, guidance_embeds=dev),
        },
    )


def _tiny_mistral() -> Mistral3ForConditionalGeneration:
    """A Mistral 3 for `mistral_tokenizer()`."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    from vivace.families.tokenizers import mistral_tokenizer

    tokenizer = mistral_tokenizer()
    text = {
        "model_type": "mistral",
        "hidden_size": small.WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": DEV_TEXT_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "sliding_window": None,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    image_token: Any = tokenizer.convert_tokens_to_ids("[IMG]")
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    )


def split(transformer: Flux2Transformer2DModel) -> Split:
    """The stock computation: the blocks with a stream each for text and picture, then those with a joint one.

    The joint blocks hand the two streams on apart, so that `State` keeps one meaning from block to block.
    """
    double = [
        Block(name=f"transformer_blocks.{i}", module=block, forward=partial(_double, block, i))
        for i, block in enumerate(transformer.transformer_blocks)
    ]
    single = [
        Block(name=f"single_transformer_blocks.{i}", module=block, forward=partial(_single, block, i))
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
    hidden_states: torch.Tensor,  # [B, S, C]
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    timestep: torch.Tensor,  # [B], 0 to 1
    img_ids: torch.Tensor,  # [S, 4]
    txt_ids: torch.Tensor,  # [T, 4]
    guidance: torch.Tensor | None = None,  # [B]
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    kv_cache: Flux2KVCache | None = None,
    kv_cache_mode: str | None = None,
    num_ref_tokens: int = 0,
    ref_fixed_timestep: float = 0.0,
) -> State:
    import torch
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    attention, scale = take_lora_scale(joint_attention_kwargs)
    extract = kv_cache_mode == "extract"
    references = num_ref_tokens if extract else 0
    with lora_scaled(transformer, scale):
        modulation = _modulation(transformer, timestep, guidance, hidden_states.dtype)
        if references:
            kv_cache = Flux2KVCache(len(transformer.transformer_blocks), len(transformer.single_transformer_blocks))
            kv_cache.num_ref_tokens = references
            clean = torch.full_like(timestep, ref_fixed_timestep)
            still = _modulation(transformer, clean, guidance, hidden_states.dtype)
            lengths = (encoder_hidden_states.shape[1], references, hidden_states.shape[1])
            modulation = _blended(modulation, still, *lengths)
        x = transformer.x_embedder(hidden_states)
        text = transformer.context_embedder(encoder_hidden_states)
        ropes = [transformer.pos_embed(ids[0] if ids.ndim == 3 else ids) for ids in (txt_ids, img_ids)]
    if kv_cache_mode is not None:
        seen = num_ref_tokens if kv_cache is None else kv_cache.num_ref_tokens
        attention = {**(attention or {}), "kv_cache": None, "kv_cache_mode": kv_cache_mode, "num_ref_tokens": seen}
    context = {
        **modulation,
        "rope": tuple(torch.cat(halves) for halves in zip(*ropes, strict=True)),
        "attention": attention,
        "kv_cache": kv_cache if kv_cache_mode is not None else None,
        "kv_cache_mode": kv_cache_mode,
        "references": references,
        "text_tokens": text.shape[1],
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(x, text=text, context=context)


def _modulation(
    transformer: Any, timestep: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The embedding of time and guidance [B, D], and what all double and all single blocks make of it."""
    temb = transformer.time_guidance_embed(
        timestep.to(dtype) * 1000, None if guidance is None else guidance.to(dtype) * 1000
    )
    return {
        "temb": temb,
        "image_modulation": transformer.double_stream_modulation_img(temb),
        "text_modulation": transformer.double_stream_modulation_txt(temb),
        "joint_modulation": transformer.single_stream_modulation(temb),
    }


def _blended(
    new: dict[str, torch.Tensor], still: dict[str, torch.Tensor], text: int, references: int, image: int
) -> dict[str, torch.Tensor]:
    """Modulation by position, [B, S, D]: the first `references` of `image` tokens follow `still`, the rest `new`."""
    import torch

    def spread(modulation: torch.Tensor, tokens: int) -> torch.Tensor:
        return modulation.unsqueeze(1).expand(-1, tokens, -1)

    rest = image - references
    kept, own = still["image_modulation"], new["image_modulation"]
    images = torch.cat([spread(kept, references), spread(own, rest)], dim=1)
    kept, own = still["joint_modulation"], new["joint_modulation"]
    joint = torch.cat([spread(own, text), spread(kept, references), spread(own, rest)], dim=1)
    return {**new, "image_modulation": images, "joint_modulation": joint}


def _double(block: torch.nn.Module, index: int, state: State) -> State:
    context, attention = state.context, state.context["attention"]
    if context["kv_cache"] is not None:
        attention = {**attention, "kv_cache": context["kv_cache"].get_double(index)}
    with lora_scaled(block, context["lora_scale"]):
        text, x = block(
            hidden_states=state.x,
            encoder_hidden_states=state.text,
            temb_mod_img=context["image_modulation"],
            temb_mod_txt=context["text_modulation"],
            image_rotary_emb=context["rope"],
            joint_attention_kwargs=attention,
        )
    return replace(state, x=x, text=text)


def _single(block: torch.nn.Module, index: int, state: State) -> State:
    context, attention = state.context, state.context["attention"]
    if context["kv_cache_mode"] is not None:
        attention = {**attention, "num_txt_tokens": context["text_tokens"]}
    if context["kv_cache"] is not None:
        attention = {**attention, "kv_cache": context["kv_cache"].get_single(index)}
    with lora_scaled(block, context["lora_scale"]):
        text, x = block(
            hidden_states=state.x,
            encoder_hidden_states=state.text,
            temb_mod=context["joint_modulation"],
            image_rotary_emb=context["rope"],
            joint_attention_kwargs=attention,
            split_hidden_states=True,
        )
    return replace(state, x=x, text=text)


def _epilogue(transformer: Any, state: State) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput

    context = state.context
    with lora_scaled(transformer, context["lora_scale"]):
        x = transformer.proj_out(transformer.norm_out(state.x[:, context["references"] :], context["temb"]))
    if context["kv_cache_mode"] != "extract":
        return Flux2Transformer2DModelOutput(sample=x) if context["return_dict"] else (x,)
    cache = context["kv_cache"]
    return Flux2Transformer2DModelOutput(sample=x, kv_cache=cache) if context["return_dict"] else (x, cache)


def inputs(
    transformer: Flux2Transformer2DModel,
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

    only_stills("FLUX.2", frames)
    config: Any = transformer.config
    device, dtype = transformer.device, transformer.dtype
    noise = noise_for(transformer, seed=seed)
    rows, columns = size[1] // 16, size[0] // 16

    def positions(*sides: int) -> torch.Tensor:
        return torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))

    return {
        "hidden_states": noise(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": noise(batch, text_tokens, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": positions(1, rows, columns, 1),
        "txt_ids": positions(1, 1, 1, text_tokens),
        "guidance": torch.full((batch,), 4.0, device=device) if config.guidance_embeds else None,
        "return_dict": False,
    }


klein_4b = partial(
    Variant,
    denoiser=KLEIN_4B,
    parameters=3_875_544_576,
    pipeline="Flux2KleinPipeline",
    text_encoders={"text_encoder": QWEN3_4B},
    text_tokens=512,
)
klein_9b = partial(
    Variant,
    denoiser=KLEIN_9B,
    parameters=9_078_581_248,
    pipeline="Flux2KleinPipeline",
    text_encoders={"text_encoder": QWEN3_8B},
    text_tokens=512,
)

FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    denoisers=("transformer",),
    denoiser_class="Flux2Transformer2DModel",
    vae_class="AutoencoderKLFlux2",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    guidance="embedded",
    prediction="flow",
    keep_16bit=("x_embedder", "context_embedder", "time_guidance_embed.*", "proj_out"),
    one_row=("*_stream_modulation*", "norm_out.linear"),
    variants={
        "dev": Variant(
            denoiser=DEV,
            parameters=32_223_281_152,
            hub_id="black-forest-labs/FLUX.2-dev",
            steps=50,
            guidance=4.0,
            text_tokens=512,
        ),
        "klein-4b": klein_4b(hub_id="black-forest-labs/FLUX.2-klein-4B", steps=4, guidance=1.0, guidance_kind="none"),
        "klein-base-4b": klein_4b(
            hub_id="black-forest-labs/FLUX.2-klein-base-4B", steps=50, guidance=4.0, guidance_kind="two_calls"
        ),
        "klein-9b": klein_9b(hub_id="black-forest-labs/FLUX.2-klein-9B", steps=4, guidance=1.0, guidance_kind="none"),
        "klein-base-9b": klein_9b(
            hub_id="black-forest-labs/FLUX.2-klein-base-9B", steps=50, guidance=4.0, guidance_kind="two_calls"
        ),
    },
    text_encoders={"text_encoder": MISTRAL_SMALL_24B},
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=16,
    several=frozenset({"Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline"}),
    takes=frozenset({"prompt", "guidance", "image", "mask", "strength"}),
    shared=frozenset({"img_ids", "txt_ids"}),
)
