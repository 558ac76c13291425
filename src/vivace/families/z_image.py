"""Z-Image and Z-Image-Turbo (arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for, only_stills
from vivace.families.published import FLUX_VAE, QWEN3_4B
from vivace.family import Block, Family, Split, State, Variant

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ZImageControlNetModel, ZImageTransformer2DModel

SINGLE_6B: Mapping[str, Any] = {"axes_lens": (1536, 512, 512)}  # else the defaults of the class

TINY: Mapping[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": small.WIDTH,
    "axes_dims": (4, 6, 6),
    "axes_lens": (1024, 64, 64),
}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels on the CPU."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    from vivace.families.tokenizers import qwen2_tokenizer

    name = pipeline_class or Z_IMAGE.pipelines[0]
    # beside the control picture, the inpainting ControlNet sees the masked one and the mask
    channels = 16 + 16 + 1 if name == "ZImageControlNetInpaintPipeline" else 16
    return small.assemble(
        name,
        {
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": lambda: small.autoencoder_kl(
                channels=16, scaling_factor=FLUX_VAE["scaling_factor"], shift_factor=FLUX_VAE["shift_factor"]
            ),
            "text_encoder": lambda: small.qwen3(layers=2),
            "tokenizer": qwen2_tokenizer,
            "transformer": lambda: small.without_zeros(ZImageTransformer2DModel(**TINY)),
            "controlnet": lambda: _tiny_controlnet(channels),
        },
    )


def _tiny_controlnet(channels: int) -> ZImageControlNetModel:
    from diffusers import ZImageControlNetModel

    shape = {key: TINY[key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    return small.without_zeros(
        ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=channels,
            add_control_noise_refiner="control_noise_refiner",
            **shape,
        )
    )


def split(transformer: ZImageTransformer2DModel) -> Split:
    """The stock computation, one step a layer of the joint sequence; the refiners of each part stand before them."""
    blocks = tuple(
        Block(name=f"layers.{i}", module=block, forward=partial(_block, block, i))
        for i, block in enumerate(transformer.layers)
    )
    return Split(prologue=partial(_prologue, transformer), blocks=blocks, epilogue=partial(_epilogue, transformer))


def _prologue(
    transformer: Any,
    *,
    x: list[torch.Tensor],  # one [C, F, H, W] a sample
    t: torch.Tensor,  # [B], 0 to 1, rising as noise falls
    cap_feats: list[torch.Tensor],  # one [T, D] a sample
    return_dict: bool = True,
    controlnet_block_samples: dict[int, torch.Tensor] | None = None,
    siglip_feats: Any = None,
    image_noise_mask: Any = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> State:
    if isinstance(x[0], list):
        raise ValueError("Z-Image Omni's nested pictures have no split; call the transformer with one latent a sample")
    _, scale = take_lora_scale(joint_attention_kwargs)
    patch = f"{patch_size}-{f_patch_size}"
    with lora_scaled(transformer, scale):
        temb = transformer.t_embedder(t * transformer.t_scale).type_as(x[0])
        pictures, captions, sizes, *rest = transformer.patchify_and_embed(x, cap_feats, patch_size, f_patch_size)
        picture_ids, caption_ids, picture_pads, caption_pads = rest
        picture = _refined(
            transformer,
            (pictures, transformer.all_x_embedder[patch], picture_ids, picture_pads, transformer.x_pad_token),
            transformer.noise_refiner,
            temb,
        )
        caption = _refined(
            transformer,
            (captions, transformer.cap_embedder, caption_ids, caption_pads, transformer.cap_pad_token),
            transformer.context_refiner,
        )
        joint, rope, mask, _ = transformer._build_unified_sequence(
            *(*picture, None), *(*caption, None), None, None, None, None, omni_mode=False, device=x[0].device
        )
    context = {
        "mask": mask,
        "rope": rope,
        "temb": temb,
        "control": controlnet_block_samples or {},
        "patch": (patch_size, f_patch_size),
        "sizes": sizes,
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(joint, context=context)


def _refined(
    transformer: Any, part: tuple, refiner: torch.nn.ModuleList, *temb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """One part of the joint sequence, embedded and refined [B, S, D], with its rotary table and lengths."""
    import torch

    features, embedder, ids, pads, pad_token = part
    lengths = [len(feature) for feature in features]
    embedded = embedder(torch.cat(features)).split(lengths)
    tokens, rope, mask, *_ = transformer._prepare_sequence(
        list(embedded), ids, pads, pad_token, None, embedded[0].device
    )
    for layer in refiner:
        tokens = layer(tokens, mask, rope, *temb)
    return tokens, rope, lengths


def _block(block: torch.nn.Module, index: int, state: State) -> State:
    context = state.context
    with lora_scaled(block, context["lora_scale"]):
        x = block(state.x, context["mask"], context["rope"], context["temb"])
    if index in context["control"]:
        x = x + context["control"][index]
    return replace(state, x=x)


def _epilogue(transformer: Any, state: State) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    context = state.context
    patch_size, f_patch_size = context["patch"]
    with lora_scaled(transformer, context["lora_scale"]):
        x = transformer.all_final_layer[f"{patch_size}-{f_patch_size}"](state.x, c=context["temb"])
    samples = transformer.unpatchify(list(x.unbind()), context["sizes"], patch_size, f_patch_size)
    return Transformer2DModelOutput(sample=samples) if context["return_dict"] else (samples,)


def inputs(
    transformer: ZImageTransformer2DModel,
    *,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 1,
    frames: int = 1,
    text_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the model's device and dtype.

    `frames` has no meaning for pictures and must be 1.
    """
    import torch

    only_stills("Z-Image", frames)
    config: Any = transformer.config
    noise = noise_for(transformer, seed=seed)
    return {
        "x": [noise(config.in_channels, 1, size[1] // 8, size[0] // 8) for _ in range(batch)],
        "t": torch.full((batch,), 0.5, device=transformer.device, dtype=transformer.dtype),
        "cap_feats": [noise(text_tokens, config.cap_feat_dim) for _ in range(batch)],
        "return_dict": False,
    }


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    denoisers=("transformer",),
    largest=lambda transformer: 8 * min(transformer.all_patch_size) * min(transformer.axes_lens[1:]),
    denoiser_class="ZImageTransformer2DModel",
    vae_class="AutoencoderKL",
    vae=FLUX_VAE,
    blocks=("layers",),
    guidance="batched",
    prediction="flow",
    keep_16bit=("all_x_embedder.*", "cap_embedder.*", "t_embedder.*", "all_final_layer.*"),
    one_row=("*.adaLN_modulation.*",),
    variants={
        "turbo": Variant(
            denoiser=SINGLE_6B,
            parameters=6_154_908_736,
            hub_id="Tongyi-MAI/Z-Image-Turbo",
            steps=9,
            guidance=0.0,
            guidance_kind="none",
            text_tokens=128,
        ),
        "base": Variant(
            denoiser=SINGLE_6B,
            parameters=6_154_908_736,
            hub_id="Tongyi-MAI/Z-Image",
            steps=50,
            guidance=4.0,
            text_tokens=128,
            batch=2,
        ),
    },
    text_encoders={"text_encoder": QWEN3_4B},
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=16,
    silent=0.0,
    takes=frozenset({"prompt", "negative", "guidance", "image", "mask", "strength", "control"}),
    listed=frozenset({"x", "cap_feats"}),
    padded={"cap_feats": None},
)
