"""Pass: convolution weights in NHWC order, which tensor cores read without a transpose."""

from __future__ import annotations

import torch

from vivace.passes.target import Pass, Target

MINIMUM = 4
"""Convolutions wider than one pixel from which a model counts as convolutional; a patch embedding is one."""


def convolutions(module: torch.nn.Module) -> list[torch.nn.Conv2d]:
    """The convolutions of a convolutional model; none where there are only a few."""
    found = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d) and max(m.kernel_size) > 1]
    return found if len(found) >= MINIMUM else []


def _modules(target: Target) -> dict[str, torch.nn.Module]:
    vae = getattr(target.subject, "vae", None) if target.subject not in target.denoisers.values() else None
    modules = {**target.denoisers, **({"vae": vae} if isinstance(vae, torch.nn.Module) else {})}
    return {name: module for name, module in modules.items() if convolutions(module)}


def _check(target: Target) -> str | None:
    if not _modules(target):
        return "no convolutional model here"
    if target.config.channels_last == "auto" and target.device.type != "cuda":
        return f"not measured to win on {target.device.type}"
    return None


def _apply(target: Target) -> None:
    for module in _modules(target).values():
        for convolution in convolutions(module):
            if not convolution.weight.is_contiguous(memory_format=torch.channels_last):
                _store(convolution, torch.channels_last)
                target.undo.callback(_store, convolution, torch.contiguous_format)
    target.done("channels_last", _forecast(target))


def _forecast(target: Target) -> str:
    return ", ".join(_modules(target))


def _store(convolution: torch.nn.Conv2d, order: torch.memory_format) -> None:
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=order)


CHANNELS_LAST = Pass(
    name="channels_last",
    why_here="before fuse: the fused blocks keep the order they find",
    wants=lambda config: config.channels_last,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
