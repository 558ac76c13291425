"""Pass: hand-fused blocks in place of a family's stock ones."""

from __future__ import annotations

import torch

from vivace.fused import Fused, fused_of
from vivace.passes.target import Pass, Target


def unfusable(denoiser: torch.nn.Module, fused: Fused) -> str | None:
    """Why the fused blocks would not compute what `denoiser` now computes; None when they do.

    They read weights and skip module calls, so every parameter must be a plain one and no module may carry a hook, a
    replaced forward, or a wrapper (an adapter, a parametrisation).
    """
    for name, module in denoiser.named_modules():
        if not type(module).__module__.startswith(("torch.nn.modules.", "diffusers.models.")):
            return f"{name or 'the denoiser'} is a {type(module).__module__}.{type(module).__name__}"
        if name and ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks):
            return f"{name} carries a hook"
        for parameter, value in module._parameters.items():
            if value is not None and type(value) is not torch.nn.Parameter:
                return f"{name}.{parameter} is a {type(value).__name__}"
            if value is not None and (value.is_meta or not value.dtype.is_floating_point):
                return f"{name}.{parameter} is offloaded or quantised"
    return fused.check(denoiser)


def check_fuse(target: Target) -> str | None:
    """Why the blocks stay stock; None when they will be fused."""
    config = target.config
    if config.fuse == "off":
        return "switched off"
    if config.fuse == "auto" and config.compile == "on":
        return "compile was asked for"
    if config.cache is not None and config.cache.modules:
        return f"cache={config.cache.name!r} works on attention modules, which fused blocks do not call"
    fused = fused_of(target.family)
    if fused is None:
        return f"no fused blocks for {target.family.name if target.family else 'an unknown family'}"
    if target.device.type not in fused.devices:
        return f"its fused blocks are for {' and '.join(sorted(fused.devices))}, this is {target.device.type}"
    return next((why for denoiser in target.denoisers.values() if (why := unfusable(denoiser, fused))), None)


def _apply(target: Target) -> None:
    fused = fused_of(target.family)
    assert fused is not None
    for lane in target.lanes.values():
        lane.fuse(fused)
    blocks = sum(len(lane.split.blocks) for lane in target.lanes.values() if lane.split)
    target.done("fuse", f"{blocks} blocks: {fused.summary}")


FUSE = Pass(
    name="fuse",
    why_here="after attention: it is built for one backend's layout",
    wants=lambda config: config.fuse,
    check=check_fuse,
    apply=_apply,
)
