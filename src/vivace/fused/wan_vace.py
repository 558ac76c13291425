"""Wan VACE's denoiser, fused: the blocks of Wan, and control blocks that leave hints for some of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vivace.errors import InputError
from vivace.family import Block, Split, State
from vivace.fused import wan
from vivace.fused.contract import Fused
from vivace.fused.cross_blocks import CrossBlock
from vivace.fused.joint import chained
from vivace.fused.parts import Parts


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a WanVACETransformer3DModel; `State.text` is the control stream, `State.skips` the hints."""
    hints = {layer: hint for hint, layer in enumerate(denoiser.config["vace_layers"])}
    control = [wan.video_block(module, index=i, parts=parts) for i, module in enumerate(denoiser.vace_blocks)]
    main = [
        wan.video_block(module, index=i, parts=parts, text=len(hints) + i) for i, module in enumerate(denoiser.blocks)
    ]
    blocks = chained("blocks", denoiser.blocks, main)
    for layer in hints:
        # A hint comes between this block and the one after it.
        main[layer].following = None
    return Split(
        prologue=partial(_prologue, denoiser),
        blocks=(
            *(
                Block(name=f"vace_blocks.{i}", module=module, forward=partial(_control, module, control[i]))
                for i, module in enumerate(denoiser.vace_blocks)
            ),
            *(
                replace(block, forward=partial(_hinted, main[i], hints[i])) if i in hints else block
                for i, block in enumerate(blocks)
            ),
        ),
        epilogue=partial(wan.epilogue, denoiser, parts.elementwise),
        once=partial(wan.prompt, denoiser, (*denoiser.vace_blocks, *denoiser.blocks)),
        once_inputs=("encoder_hidden_states", "encoder_hidden_states_image"),
    )


def _prologue(
    denoiser: Any,
    *,
    control_hidden_states: torch.Tensor,  # [B, C, F, H, W]
    control_hidden_states_scale: torch.Tensor | None = None,  # [layers]
    **kwargs: Any,
) -> State:
    state, layers = wan.prologue(denoiser, **kwargs), len(denoiser.vace_blocks)
    scales = (
        control_hidden_states.new_ones(layers) if control_hidden_states_scale is None else control_hidden_states_scale
    )
    if len(scales) != layers:
        raise InputError(f"this model has {layers} control layers, got {len(scales)} scales; pass one for each")
    control = denoiser.vace_patch_embedding(control_hidden_states).flatten(2).transpose(1, 2)
    missing = state.x.shape[1] - control.shape[1]
    control = torch.cat([control, control.new_zeros(len(control), missing, control.shape[2])], dim=1)
    return replace(state, text=control, context={**state.context, "scales": scales.unbind()})


def _control(module: Any, block: CrossBlock, state: State) -> State:
    """One control block: its stream goes on, and a hint is left."""
    context, elementwise, control = state.context, block.elementwise, state.text
    assert control is not None
    if module.proj_in is not None:
        control = elementwise.residual(module.proj_in(control), state.x)
    x, y, gate = block.advance(control, elementwise.norm(control, **block.norm(context)), context)
    control = elementwise.residual(x, y, gate=gate)
    hint = module.proj_out(control) * context["scales"][block.index]
    return replace(state, text=control, skips=(*state.skips, hint))


def _hinted(block: CrossBlock, hint: int, state: State) -> State:
    state = block(state)
    return replace(state, x=block.elementwise.residual(state.x, state.skips[hint]))


WAN_VACE = Fused(
    summary=wan.WAN.summary,
    check=wan.check,
    declines=wan.declines,
    build=build,
    outside=lambda denoiser: wan.outside((*denoiser.vace_blocks, *denoiser.blocks)),
)
