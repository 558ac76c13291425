"""Wan 2.1 VACE: videos made and edited under a control video, masks and reference pictures (arXiv 2503.07598)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.families import tiny as small
from vivace.families import wan
from vivace.families.lora_scale import lora_scaled
from vivace.families.noise import noise_for
from vivace.family import Block, Family, Split, State

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, WanVACETransformer3DModel

VACE_1_3B: Mapping[str, Any] = {**wan.T2V_1_3B, "vace_layers": tuple(range(0, 30, 2)), "vace_in_channels": 96}
VACE_14B: Mapping[str, Any] = {**wan.T2V_14B, "vace_layers": tuple(range(0, 40, 5)), "vace_in_channels": 96}
TINY: Mapping[str, Any] = {**wan.TINY, "num_layers": 3, "vace_layers": (0, 2), "vace_in_channels": 96}


def tiny(pipeline_class: str | None = None) -> DiffusionPipeline:
    """A random pipeline of one of the family's classes, for 64 x 64 pixels and 5 frames on the CPU."""
    from diffusers import WanVACETransformer3DModel

    return small.assemble(
        pipeline_class or WAN_VACE.pipelines[0],
        {**wan.tiny_surroundings(), "transformer": lambda: WanVACETransformer3DModel(**TINY)},
    )


def split(transformer: WanVACETransformer3DModel) -> Split:
    """The stock computation: the control blocks, which leave hints, then the blocks, some of which take one.

    `State.text` holds the control stream, `State.skips` the hints.
    """
    takers = {layer: hint for hint, layer in enumerate(transformer.config["vace_layers"])}
    control = [
        Block(name=f"vace_blocks.{i}", module=block, forward=partial(_control, block, i))
        for i, block in enumerate(transformer.vace_blocks)
    ]
    blocks = [
        Block(name=f"blocks.{i}", module=block, forward=partial(_block, block, takers.get(i)))
        for i, block in enumerate(transformer.blocks)
    ]
    return Split(
        prologue=partial(_prologue, transformer),
        blocks=(*control, *blocks),
        epilogue=partial(wan.epilogue, transformer),
    )


def _prologue(
    transformer: Any,
    *,
    control_hidden_states: torch.Tensor,  # [B, C, F, H, W]
    control_hidden_states_scale: torch.Tensor | None = None,  # [layers]
    **kwargs: Any,
) -> State:
    import torch

    layers = len(transformer.config.vace_layers)
    if control_hidden_states_scale is None:
        control_hidden_states_scale = control_hidden_states.new_ones(layers)
    if len(control_hidden_states_scale) != layers:
        raise ValueError(f"control_hidden_states_scale has {len(control_hidden_states_scale)} values; pass {layers}")
    state = wan.prologue(transformer, **kwargs)
    with lora_scaled(transformer, state.context["lora_scale"]):
        control = transformer.vace_patch_embedding(control_hidden_states).flatten(2).transpose(1, 2)
    missing = state.x.shape[1] - control.shape[1]
    control = torch.cat([control, control.new_zeros(len(control), missing, control.shape[2])], dim=1)
    return replace(state, text=control, context={**state.context, "scales": control_hidden_states_scale.unbind()})


def _control(block: torch.nn.Module, index: int, state: State) -> State:
    context = state.context
    with lora_scaled(block, context["lora_scale"]):
        hint, control = block(state.x, context["text"], state.text, context["modulation"], context["rope"])
    return replace(state, text=control, skips=(*state.skips, hint * context["scales"][index]))


def _block(block: torch.nn.Module, hint: int | None, state: State) -> State:
    context = state.context
    with lora_scaled(block, context["lora_scale"]):
        x = block(state.x, context["text"], context["modulation"], context["rope"])
    return replace(state, x=x if hint is None else x + state.skips[hint].to(x.device))


def inputs(
    transformer: WanVACETransformer3DModel,
    *,
    size: tuple[int, int] = (832, 480),
    batch: int = 1,
    frames: int = 81,
    text_tokens: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Random keyword arguments of one forward, as those of Wan, and a control video."""
    shared: Any = transformer
    given = wan.inputs(shared, size=size, batch=batch, frames=frames, text_tokens=text_tokens, seed=seed)
    shape = given["hidden_states"].shape[2:]
    control = noise_for(transformer, seed=seed + 1)(batch, transformer.config["vace_in_channels"], *shape)
    return {**given, "control_hidden_states": control}


WAN_VACE = Family(
    name="wan_vace",
    title="Wan 2.1 VACE",
    pipelines=("WanVACEPipeline",),
    denoisers=("transformer",),
    denoiser_class="WanVACETransformer3DModel",
    vae_class="AutoencoderKLWan",
    blocks=("vace_blocks", "blocks"),
    grid=wan.grid,
    guidance="two_calls",
    prediction="flow",
    keep_16bit=("vace_patch_embedding", *wan.WAN.keep_16bit),
    variants={
        "1.3b": wan.video(
            denoiser=VACE_1_3B, parameters=2_153_972_032, hub_id="Wan-AI/Wan2.1-VACE-1.3B-diffusers", size=(832, 480)
        ),
        "14b": wan.video(denoiser=VACE_14B, parameters=17_337_592_896, hub_id="Wan-AI/Wan2.1-VACE-14B-diffusers"),
    },
    text_encoders=wan.WAN.text_encoders,
    split=split,
    tiny=tiny,
    inputs=inputs,
    multiple=16,
    packed=4,
    media="video",
    takes=frozenset({"prompt", "negative", "guidance"}),
    shared=frozenset({"control_hidden_states_scale"}),
)
