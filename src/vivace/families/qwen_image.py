"""Qwen-Image, Qwen-Image-Edit and Edit-Plus (arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for, only_stills
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

BASE: Mapping[str, Any] = {}  # the defaults of the class
# From Edit-2511 on, the pictures to edit are modulated as at time zero.
STILL_REFERENCES: Mapping[str, Any] = {"zero_cond_t": True}
QWEN_VL_7B = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
)

TINY: Mapping[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": small.WIDTH,
}
# Layers are told apart in a picture's positions, and whether they are opaque beside the time.
TINY_OWN: Mapping[str, Mapping[str, Any]] = {
    "QwenImageLayeredPipeline": {"use_additional_t_cond": True, "use_layer3d_rope": True}
}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageControlNetModel,
        QwenImageTransformer2DModel,
    )

    from vivace.families.tokenizers import qwen2_tokenizer, qwen_vl_processor

    name = pipeline_class or QWEN_IMAGE.pipelines[0]
    # beside the latents of the picture, the inpainting ControlNet sees the mask, in patches of 2 x 2
    extra = 4 if name == "QwenImageControlNetInpaintPipeline" else 0
    return small.assemble(
        name,
        {
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0),
            "vae": lambda: AutoencoderKLQwenImage(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            "text_encoder": _tiny_text_encoder,
            "tokenizer": qwen2_tokenizer,
            "processor": qwen_vl_processor,
            "transformer": lambda: QwenImageTransformer2DModel(**TINY, **TINY_OWN.get(name, {})),
            "controlnet": lambda: small.without_zeros(
                QwenImageControlNetModel(**{**TINY, "num_layers": 1}, extra_condition_channels=extra)
            ),
        },
    )


def _tiny_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen 2.5-VL for `qwen2_tokenizer()` and `qwen_vl_processor()`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from vivace.families.tokenizers import qwen2_tokenizer

    tokenizer = qwen2_tokenizer()
    special: dict[str, Any] = {
        f"{role}_token_id": tokenizer.convert_tokens_to_ids(token)
        for role, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    text = {
        "hidden_size": small.WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": small.WIDTH,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))


def split(transformer: QwenImageTransformer2DModel) -> Split:
    """The stock computation, one step a joint block."""
    blocks = tuple(
        Block(name=f"transformer_blocks.{i}", module=block, forward=partial(_block, block, i))
        for i, block in enumerate(transformer.transformer_blocks)
    )
    return Split(prologue=partial(_prologue, transformer), blocks=blocks, epilogue=partial(_epilogue, transformer))


def _prologue(
    transformer: Any,
    *,
    hidden_states: torch.Tensor,  # [B, S, C], patches of 2 x 2 latent positions, pictures to edit after the new one
    encoder_hidden_states: torch.Tensor,  # [B, T, D]
    timestep: torch.Tensor,  # [B], 0 to 1
    img_shapes: list[list[tuple[int, int, int]]],  # frames, rows and columns of each sample's pictures
    encoder_hidden_states_mask: torch.Tensor | None = None,  # [B, T], 1 for words
    guidance: torch.Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: list[torch.Tensor] | None = None,
    additional_t_cond: torch.Tensor | None = None,
    return_dict: bool = True,
) -> State:
    import torch
    from diffusers.models.transformers.transformer_qwenimage import compute_text_seq_len_from_mask

    attention, scale = take_lora_scale(attention_kwargs)
    with lora_scaled(transformer, scale):
        x = transformer.img_in(hidden_states)
        timestep = timestep.to(x.dtype)
        references = None
        if transformer.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])
            references = _references(img_shapes, x.device)
        text = transformer.txt_in(transformer.txt_norm(encoder_hidden_states))
        text_tokens, _, mask = compute_text_seq_len_from_mask(text, encoder_hidden_states_mask)
        scalars = [timestep] if guidance is None else [timestep, guidance.to(x.dtype) * 1000]
        temb = transformer.time_text_embed(*scalars, x, additional_t_cond)
        rope = transformer.pos_embed(img_shapes, max_txt_seq_len=text_tokens, device=x.device)
    block = {
        "encoder_hidden_states_mask": mask,
        "temb": temb,
        "image_rotary_emb": rope,
        "joint_attention_kwargs": attention,
        "modulate_index": references,
    }
    context = {
        "block": block,
        "control": spread(controlnet_block_samples, len(transformer.transformer_blocks)),
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(x, text=text, context=context)


def _references(img_shapes: list[list[tuple[int, int, int]]], device: torch.device) -> torch.Tensor:
    """Which positions [B, S] belong to a picture to edit (1) and which to the new one (0)."""
    import torch

    rows = [[0] * prod(new) + [1] * sum(map(prod, rest)) for new, *rest in img_shapes]
    return torch.tensor(rows, device=device, dtype=torch.int)


def spread(residuals: list[torch.Tensor] | None, blocks: int) -> list[torch.Tensor] | None:
    """One control residual a block, shared by neighbours."""
    if residuals is None:
        return None
    interval = ceil(blocks / len(residuals))
    return [residuals[i // interval] for i in range(blocks)]


def _block(block: torch.nn.Module, index: int, state: State) -> State:
    context = state.context
    with lora_scaled(block, context["lora_scale"]):
        text, x = block(hidden_states=state.x, encoder_hidden_states=state.text, **context["block"])
    if context["control"] is not None:
        x = x + context["control"][index]
    return replace(state, x=x, text=text)


def _epilogue(transformer: Any, state: State) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    temb = state.context["block"]["temb"]
    if transformer.zero_cond_t:
        temb = temb.chunk(2)[0]
    with lora_scaled(transformer, state.context["lora_scale"]):
        x = transformer.proj_out(transformer.norm_out(state.x, temb))
    return Transformer2DModelOutput(sample=x) if state.context["return_dict"] else (x,)


def signal(transformer: Any, state: State) -> torch.Tensor:
    """The first block's modulated text: [B, T, D]."""
    block, temb = transformer.transformer_blocks[0], state.context["block"]["temb"]
    if transformer.zero_cond_t:
        temb = temb.chunk(2)[0]
    shift, scale = block.txt_mod(temb).unsqueeze(1).chunk(6, dim=-1)[:2]
    return block.txt_norm1(state.text) * (1 + scale) + shift


def inputs(
    transformer: QwenImageTransformer2DModel,
    *,
    size: tuple[int, int] = (1328, 1328),
    batch: int = 1,
    frames: int = 1,
    text_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the model's device and dtype.

    `frames` has no meaning for pictures and must be 1.
    """
    import torch

    only_stills("Qwen-Image", frames)
    config: Any = transformer.config
    device, dtype = transformer.device, transformer.dtype
    noise = noise_for(transformer, seed=seed)
    rows, columns = size[1] // 16, size[0] // 16
    return {
        "hidden_states": noise(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": noise(batch, text_tokens, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, rows, columns)]] * batch,
        "return_dict": False,
    }


picture = partial(Variant, denoiser=BASE, parameters=20_430_401_088, steps=50, guidance=4.0)
edit_plus = partial(picture, pipeline="QwenImageEditPlusPipeline", steps=40, text_tokens=512)

QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageLayeredPipeline",
    ),
    denoisers=("transformer",),
    denoiser_class="QwenImageTransformer2DModel",
    vae_class="AutoencoderKLQwenImage",
    blocks=("transformer_blocks",),
    guidance="two_calls",
    prediction="flow",
    keep_16bit=("img_in", "txt_in", "time_text_embed.*", "proj_out"),
    one_row=("*.img_mod.*", "*.txt_mod.*", "norm_out.linear"),
    variants={
        "base": picture(
            hub_id="Qwen/Qwen-Image",
            size=(1328, 1328),
            text_tokens=128,
            teacache=(20.04634615, 3.13881129, -11.25528647, 4.70808005, -0.15457715),
        ),
        "edit": picture(hub_id="Qwen/Qwen-Image-Edit", pipeline="QwenImageEditPipeline", text_tokens=512),
        "edit-plus": edit_plus(hub_id="Qwen/Qwen-Image-Edit-2509"),
        "edit-2511": edit_plus(hub_id="Qwen/Qwen-Image-Edit-2511", denoiser=STILL_REFERENCES),
    },
    text_encoders={"text_encoder": QWEN_VL_7B},
    split=split,
    tiny=tiny,
    inputs=inputs,
    signal=signal,
    multiple=16,
    takes=frozenset({"prompt", "negative", "true_cfg", "image", "mask", "strength", "control"}),
    several=frozenset({"QwenImageEditPlusPipeline"}),
    own_size=frozenset({"QwenImageEditInpaintPipeline"}),
    listed=frozenset({"img_shapes"}),
    padded={"encoder_hidden_states": "encoder_hidden_states_mask"},
)
