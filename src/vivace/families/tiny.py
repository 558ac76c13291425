"""Small random components that the families' tiny pipelines share, and the assembly of a pipeline from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        ControlNetUnionModel,
        DiffusionPipeline,
        T2IAdapter,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
        Qwen3ForCausalLM,
        T5EncoderModel,
    )

WIDTH = 32  # of every tiny text or image embedding


def assemble(pipeline_class: str, parts: Mapping[str, Callable[[], Any]]) -> DiffusionPipeline:
    """A pipeline of the diffusers class `pipeline_class`, on the CPU, from builders by slot; always the same weights.

    The class takes what its constructor names; a slot without a builder stays at the constructor's default.
    """
    import diffusers
    import torch

    cls = getattr(diffusers, pipeline_class)
    slots = [name for name in inspect.signature(cls.__init__).parameters if name in parts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = cls(**{slot: parts[slot]() for slot in slots})
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder_kl(*, channels: int = 4, **config: Any) -> AutoencoderKL:
    """An image autoencoder: 8 pixels a side become one latent position."""
    from diffusers import AutoencoderKL

    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 64,
        "force_upcast": False,
    }
    return AutoencoderKL(latent_channels=channels, **{**shape, **config})


def clip_text() -> CLIPTextModel:
    """A CLIP text encoder for `clip_tokenizer()`."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_text_config())


def clip_text_projected() -> CLIPTextModelWithProjection:
    """A CLIP text encoder with the projection that pooled prompts come from."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_text_config())


def _clip_text_config() -> Any:
    from transformers import CLIPTextConfig

    from vivace.families.tokenizers import clip_tokenizer

    tokenizer: Any = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_vision(*, image_size: int = 32) -> CLIPVisionModelWithProjection:
    """A CLIP image encoder of 4 x 4 patches for `clip_image_processor(size=image_size)`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=image_size // 4,
    )
    return CLIPVisionModelWithProjection(config)


def t5_encoder() -> T5EncoderModel:
    """A T5 encoder for `t5_tokenizer()`."""
    from transformers import T5Config, T5EncoderModel

    from vivace.families.tokenizers import t5_tokenizer

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that fits `unet`, already trained in the sense that its output layers are not zero."""
    from diffusers import ControlNetModel

    return without_zeros(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16)))


def controlnet_union(unet: UNet2DConditionModel) -> ControlNetUnionModel:
    """A ControlNet for any of six kinds of control picture, which fits an SDXL `unet`."""
    from diffusers import ControlNetUnionModel

    config: Any = unet.config
    width = config.block_out_channels[0]
    shape = {
        name: config[name]
        for name in (
            "down_block_types",
            "block_out_channels",
            "layers_per_block",
            "norm_num_groups",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "attention_head_dim",
            "use_linear_projection",
            "addition_embed_type",
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        )
    }
    return without_zeros(
        ControlNetUnionModel(
            **shape,
            conditioning_embedding_out_channels=(8, 8, 16, 16),
            num_trans_channel=width,
            num_trans_head=2,
            num_proj_channel=width,
        )
    )


def without_zeros(module: Any) -> Any:
    """`module` with small random values where a parameter is all zero, as output layers are before training."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.05)
    return module


def t2i_adapter(unet: UNet2DConditionModel, *, kind: str, downscale: int) -> T2IAdapter:
    """A T2I-Adapter that fits `unet`; `kind` is "full_adapter" or, for SDXL, "full_adapter_xl"."""
    from diffusers import T2IAdapter

    config: Any = unet.config
    channels = list(config.block_out_channels)
    return T2IAdapter(in_channels=3, channels=channels, num_res_blocks=1, downscale_factor=downscale, adapter_type=kind)


def qwen3(*, layers: int) -> Qwen3ForCausalLM:
    """A Qwen 3 for `qwen2_tokenizer()`; `layers` is at least the highest one whose output the pipeline reads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from vivace.families.tokenizers import qwen2_tokenizer

    tokenizer: Any = qwen2_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)
