"""Pass: which backend computes attention."""

from __future__ import annotations

import torch

from vivace.attention import backend_of
from vivace.attention.backend import Backend
from vivace.attention.guard import guarded
from vivace.attention.native import RULES
from vivace.attention.route import Route
from vivace.config import Config, Switch
from vivace.passes.target import Pass, Target
from vivace.request import LAYER


def _chosen(config: Config) -> Backend:
    return backend_of("native" if config.attention == "auto" else config.attention)


def _wants(config: Config) -> Switch:
    return "auto" if config.attention == "auto" and not config.check_nan else "on"


def _check(target: Target) -> str | None:
    return _chosen(target.config).refuses(device=target.device, dtype=target.dtype)


def _apply(target: Target) -> None:
    chosen, config = _chosen(target.config), target.config
    attend = guarded(chosen) if config.check_nan else chosen.attend
    rules = tuple(rule for rule in RULES if _sm(target.device) == rule.sm)
    for lane in target.lanes.values():
        lane.attend = attend
        # Plain SDPA is what stock modules call anyway.
        if chosen.name != "native" or config.check_nan or rules:
            lane.route = Route(chosen, attend=attend)
    if config.check_nan:
        for name, block in target.repeated_blocks():
            target.undo.callback(block.register_forward_pre_hook(_naming(name)).remove)
    kernels = ", ".join(f"{r.kernel.name.lower()} from {r.sequence} keys" for r in rules) or "torch chooses the kernel"
    detail = f"{chosen.name} ({kernels})" if chosen.name == "native" else chosen.name
    target.done("attention", detail + (", every output checked for NaN" if config.check_nan else ""))


def _sm(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _naming(name: str):
    def hook(module: torch.nn.Module, arguments: tuple) -> None:
        LAYER.set(name)

    return hook


ATTENTION = Pass(
    name="attention",
    why_here="first: its layout and dtype decide what the fused blocks write",
    wants=_wants,
    check=_check,
    apply=_apply,
)
