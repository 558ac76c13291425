"""The image UNet that Stable Diffusion, SDXL and LCM share: its Split and its inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families.lora_scale import lora_scaled, take_lora_scale
from vivace.families.noise import noise_for, only_stills
from vivace.family import Block, Split, State

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

# What a latent UNet keeps in 16 bit: first and last layers, and embeddings, which are small and sensitive.
KEEP_16BIT = ("conv_in", "conv_out", "time_embedding.*", "add_embedding.*", "encoder_hid_proj.*", "*.time_emb_proj")
BLOCKS = ("down_blocks", "mid_block", "up_blocks")


def split(unet: UNet2DConditionModel) -> Split:
    """The stock computation of a UNet, one step a down, mid or up block."""
    down = [
        Block(name=f"down_blocks.{i}", module=block, forward=partial(_down, block, i))
        for i, block in enumerate(unet.down_blocks)
    ]
    mid = [] if unet.mid_block is None else [_mid_block(unet)]
    last = len(unet.up_blocks) - 1
    up = [
        Block(name=f"up_blocks.{i}", module=block, forward=partial(_up, block, last=i == last))
        for i, block in enumerate(unet.up_blocks)
    ]
    return Split(prologue=partial(_prologue, unet), blocks=(*down, *mid, *up), epilogue=partial(_epilogue, unet))


def _mid_block(unet: UNet2DConditionModel) -> Block:
    return Block(name="mid_block", module=unet.mid_block, forward=partial(_mid, unet.mid_block, len(unet.down_blocks)))


def _prologue(
    unet: Any,
    *,
    sample: torch.Tensor,  # [B, C, H, W]
    timestep: torch.Tensor | float | int,
    encoder_hidden_states: torch.Tensor,  # [B, S, D]
    class_labels: torch.Tensor | None = None,
    timestep_cond: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
    mid_block_additional_residual: torch.Tensor | None = None,
    down_intrablock_additional_residuals: list[torch.Tensor] | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    return_dict: bool = True,
) -> State:
    cross_attention_kwargs, scale = take_lora_scale(cross_attention_kwargs)
    control, adapter = None, down_intrablock_additional_residuals
    if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
        control = (down_block_additional_residuals, mid_block_additional_residual)
    elif adapter is None:
        # before its own argument came, a T2I-Adapter's residuals travelled in the ControlNet's
        adapter = down_block_additional_residuals
    with lora_scaled(unet, scale):
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        sample, emb = _embed(
            unet, sample, timestep, timestep_cond, class_labels, encoder_hidden_states, added_cond_kwargs
        )
        text = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
        x = unet.conv_in(sample)
        if cross_attention_kwargs and cross_attention_kwargs.get("gligen") is not None:
            objects = {"objs": unet.position_net(**cross_attention_kwargs["gligen"])}
            cross_attention_kwargs = {**cross_attention_kwargs, "gligen": objects}
    attention = {
        "encoder_hidden_states": text,
        "attention_mask": _bias(attention_mask, sample.dtype),
        "encoder_attention_mask": _bias(encoder_attention_mask, sample.dtype),
        "cross_attention_kwargs": cross_attention_kwargs,
    }
    context = {
        "emb": emb,
        "attention": attention,
        "control": control,
        "adapter": adapter or (),
        # a size the up path would not hit by doubling is read off the skips
        "odd_size": any(side % 2**unet.num_upsamplers for side in sample.shape[-2:]),
        "lora_scale": scale,
        "return_dict": return_dict,
    }
    return State(x, skips=(x,), context=context)


def _embed(
    unet: Any,
    sample: torch.Tensor,
    timestep: torch.Tensor | float | int,
    timestep_cond: torch.Tensor | None,
    class_labels: torch.Tensor | None,
    text: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample, with an image hint where the model takes one, and the embedding that modulates every block."""
    import torch

    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
    classes = unet.get_class_embed(sample=sample, class_labels=class_labels)
    if classes is not None:
        emb = torch.cat([emb, classes], dim=-1) if unet.config.class_embeddings_concat else emb + classes
    extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    if unet.config.addition_embed_type == "image_hint":
        extra, hint = extra
        sample = torch.cat([sample, hint], dim=1)
    if extra is not None:
        emb = emb + extra
    if unet.time_embed_act is not None:
        emb = unet.time_embed_act(emb)
    return sample, emb


def _down(block: Any, index: int, state: State) -> State:
    context = state.context
    adapter = context["adapter"][index] if index < len(context["adapter"]) else None
    with lora_scaled(block, context["lora_scale"]):
        if getattr(block, "has_cross_attention", False):
            residual = {} if adapter is None else {"additional_residuals": adapter}
            x, skips = block(hidden_states=state.x, temb=context["emb"], **context["attention"], **residual)
        else:
            x, skips = block(hidden_states=state.x, temb=context["emb"])
            if adapter is not None:
                # the block's last skip is its output: the residual belongs to both
                x = x + adapter
                skips = (*skips[:-1], x)
    return replace(state, x=x, skips=(*state.skips, *skips))


def _mid(block: Any, index: int, state: State) -> State:
    context = state.context
    attention = context["attention"] if getattr(block, "has_cross_attention", False) else {}
    with lora_scaled(block, context["lora_scale"]):
        x = block(state.x, context["emb"], **attention)
    rest = context["adapter"][index:]
    if rest and rest[0].shape == x.shape:
        x = x + rest[0]
    return replace(state, x=x)


def join_control(state: State) -> State:
    """Adds a ControlNet's residuals, down ones to the skips and the mid one to the stream."""
    down, mid = state.context["control"]
    skips = tuple(skip + residual for skip, residual in zip(state.skips, down, strict=False))
    # A stream that an earlier step left in front of a later up block has taken its own mid residual.
    x = state.x + mid if state.x.shape[1:] == mid.shape[1:] else state.x
    return replace(state, x=x, skips=skips, context={**state.context, "control": None})


def _up(block: Any, state: State, *, last: bool) -> State:
    context = state.context
    if context["control"] is not None:
        state = join_control(state)
    count = len(block.resnets)
    skips, own = state.skips[:-count], state.skips[-count:]
    size = skips[-1].shape[2:] if context["odd_size"] and not last else None
    attention = context["attention"] if getattr(block, "has_cross_attention", False) else {}
    with lora_scaled(block, context["lora_scale"]):
        x = block(
            hidden_states=state.x, temb=context["emb"], res_hidden_states_tuple=own, upsample_size=size, **attention
        )
    return replace(state, x=x, skips=skips)


def _epilogue(unet: Any, state: State) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    x = state.x
    with lora_scaled(unet, state.context["lora_scale"]):
        if unet.conv_norm_out:
            x = unet.conv_act(unet.conv_norm_out(x))
        x = unet.conv_out(x)
    return UNet2DConditionOutput(sample=x) if state.context["return_dict"] else (x,)


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A keep mask [B, S] as a bias on attention scores [B, 1, S]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def residuals(unet: Any, *, size: tuple[int, int], batch: int, seed: int = 0) -> dict[str, Any]:
    """What a ControlNet hands a UNet's forward at `size` (width, height) in pixels, random: a map for every skip."""
    noise = noise_for(unet, seed=seed + 1)
    width, height = (side // 8 for side in size)
    maps = [noise(batch, unet.config.block_out_channels[0], height, width)]
    for block in unet.down_blocks:
        maps += [noise(batch, resnet.out_channels, height, width) for resnet in block.resnets]
        if block.downsamplers:
            width, height = (width + 1) // 2, (height + 1) // 2
            maps.append(noise(batch, block.resnets[-1].out_channels, height, width))
    middle = noise(*maps[-1].shape)
    return {"down_block_additional_residuals": maps, "mid_block_additional_residual": middle}


def inputs(
    unet: UNet2DConditionModel,
    *,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 2,
    frames: int = 1,
    text_tokens: int = 77,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward at `size` (width, height) in pixels, on the UNet's device and dtype.

    `frames` has no meaning for pictures and must be 1.
    """
    import torch

    only_stills("a Stable Diffusion UNet", frames)
    config: Any = unet.config
    device, dtype = unet.device, unet.dtype
    noise = noise_for(unet, seed=seed)
    width, height = (side // 8 for side in size)
    kwargs: dict[str, Any] = {
        "sample": noise(batch, config.in_channels, height, width),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": noise(batch, text_tokens, config.cross_attention_dim),
        "return_dict": False,
    }
    if config.time_cond_proj_dim is not None:
        kwargs["timestep_cond"] = noise(batch, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        # original size, crop corner and target size, each embedded by itself; the pooled text takes what is left
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        ids = torch.tensor([[size[1], size[0], 0, 0, size[1], size[0]]], device=device, dtype=dtype)
        kwargs["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": ids.expand(batch, -1)}
    return kwargs
