"""Pass: which backend computes attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from vivace.attention import backend_of
from vivace.attention.backend import Backend, within_bounds
from vivace.attention.cudnn_fp8 import CUDNN_FP8, where_it_wins
from vivace.attention.ends import Ends, with_exact_ends
from vivace.attention.guard import guarded
from vivace.attention.native import RULES, settle_order
from vivace.attention.route import Route
from vivace.config import Config, Switch
from vivace.passes.target import Pass, Target
from vivace.request import Announce

CHOOSES = ("auto", "auto_fp8")
"""What leaves the choice to us."""


def _named(config: Config) -> Backend:
    """The backend that was asked for by name, native where the choice is ours."""
    return backend_of("native" if config.attention in CHOOSES else config.attention)


def _choice(target: Target) -> tuple[Backend, str]:
    """The backend, and why it is not in fp8 where that might have been."""
    named = _named(target.config)
    if target.config.attention != "auto_fp8":
        return named, ""
    if target.device.type not in CUDNN_FP8.devices:
        return named, f"no fp8: it is not for {target.device.type}"  # with no package
    fp8 = where_it_wins(target.device)
    if reason := CUDNN_FP8.refuses(device=target.device, dtype=target.dtype):
        return named, f"no fp8: {reason}"
    if fp8 is None:
        return named, "no fp8: not measured to win on this GPU; attention='cudnn_fp8' asks for it"
    if target.config.exact_ends and _bare(target):
        return named, "no fp8: a bare denoiser has no first and last steps to leave in 16 bit; exact_ends=0"
    return fp8, ""


def _bare(target: Target) -> bool:
    return target.subject in target.denoisers.values()


def _wants(config: Config) -> Switch:
    return "auto" if config.attention in CHOOSES and not config.check_nan else "on"


def _check(target: Target) -> str | None:
    chosen, _ = _choice(target)
    if target.config.exact_ends and not chosen.exact and _bare(target):
        return "exact_ends counts the steps of a pipeline's call, and this is a bare denoiser"
    if chosen.asks_where and (target.family is None or target.family.grid is None):
        return "it is for videos, and no family here says how its tokens lie in space and time; use attention='native'"
    return chosen.refuses(device=target.device, dtype=target.dtype)


def _apply(target: Target) -> None:
    (chosen, _), config = _choice(target), target.config
    if not chosen.masks or chosen.depth is not None:
        chosen = replace(chosen, attend=within_bounds(chosen))  # fused blocks call it beside the route
    ends = Ends(config.exact_ends, share=chosen.dense_share)
    ends = None if chosen.exact or ends == Ends(0) else ends
    if ends:
        chosen = replace(chosen, attend=with_exact_ends(chosen))
    attend = guarded(chosen) if config.check_nan else chosen.attend
    rules = tuple(rule for rule in RULES if _sm(target.device) == rule.sm)
    if rules:
        settle_order(target.device)
    for lane in target.lanes.values():
        lane.attend = attend
        lane.grid = target.family.grid if chosen.asks_where and target.family else None
        lane.ends = ends
        # Plain SDPA is what stock modules call anyway.
        if chosen.name != "native" or config.check_nan or rules:
            lane.route = Route(chosen, attend=attend)
    if names_blocks(config):
        for name, block in target.repeated_blocks():
            target.undo.callback(block.register_forward_pre_hook(Announce(name)).remove)
    target.done("attention", _forecast(target))


def names_blocks(config: Config) -> bool:
    """Whether attention wants to know which block it computes for."""
    return config.check_nan or _named(config).asks_where


def _forecast(target: Target) -> str:
    return _used(target) + (", every output checked for NaN" if target.config.check_nan else "")


def _used(target: Target) -> str:
    """The backend, and for torch's own the kernels that rules choose."""
    (chosen, instead), ends = _choice(target), target.config.exact_ends
    if not chosen.exact:
        shares = [f"native in the first and last {ends} steps"] if ends else []
        return f"{chosen.name} ({'; '.join(['not exact', *shares, *filter(None, [chosen.leaves])])})"
    if chosen.name != "native":
        return chosen.name
    rules = [f"{r.kernel.name.lower()} from {r.sequence} keys" for r in RULES if _sm(target.device) == r.sm]
    return f"native ({'; '.join([', '.join(rules) or 'torch chooses the kernel', *filter(None, [instead])])})"


def attention_of(target: Target) -> dict[str, dict[str, Any]]:
    """What computes each kind of attention layer: `{"self": {"layers": 70, "backend": "native (...)"}, ...}`.

    A joint layer's keys are those of picture and text, a cross layer's are the text's, a self layer's its queries'.
    """
    kinds = Counter(
        _kind(module)
        for denoiser in target.denoisers.values()
        for module in denoiser.modules()
        if hasattr(module, "processor")
    )
    return {kind: {"layers": kinds[kind], "backend": _used(target)} for kind in sorted(kinds)}


def _kind(layer: Any) -> str:
    if getattr(layer, "add_k_proj", None) is not None:
        return "joint"
    return "cross" if getattr(layer, "is_cross_attention", False) else "self"


def _sm(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


ATTENTION = Pass(
    name="attention",
    why_here="first: its layout and dtype decide what the fused blocks write",
    wants=_wants,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
