"""Pass: CUDA graphs around the denoiser call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vivace.passes.channels_last import convolutions
from vivace.passes.quantize import quantises
from vivace.passes.target import Pass, Target

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Graphs win for denoisers of at most `parameters`; None stands for any size, every GPU, every kind of denoiser."""

    parameters: int | None = None
    sm: tuple[int, int] | None = None  # compute capability
    media: str | None = None
    convolutional: bool | None = None
    quantised: bool | None = None


# Measured on an H200 beside 16 cores, a call without a graph and with one: SD 3.5 medium 57 and 44 ms; FLUX in fp8 110
# and 85. Qwen-Image in 16 bit at 1024² takes 122 to 228 ms without one: launching it takes as long as computing it. The
# few, long kernels of a video transformer keep the GPU busy as they are, and a graph would hold much memory.
RULES: tuple[Rule, ...] = (
    Rule(parameters=1_000_000_000),
    Rule(media="image"),
    Rule(parameters=3_000_000_000, convolutional=True),
    Rule(quantised=True),
)
LAUNCHED = 0.2
"""Seconds in which any image denoiser's call is launched: streamed blocks that take longer to come hide that."""


def wins(denoiser: torch.nn.Module, *, media: str | None, sm: tuple[int, int] | None, quantised: bool) -> bool:
    """Whether a rule says that graphs win for `denoiser` of a family of `media` on GPUs of compute capability `sm`."""
    size, convolutional = sum(p.numel() for p in denoiser.parameters()), bool(convolutions(denoiser))
    return any(
        (rule.parameters is None or size <= rule.parameters)
        and rule.sm in (None, sm)
        and rule.media in (None, media)
        and rule.convolutional in (None, convolutional)
        and rule.quantised in (None, quantised)
        for rule in RULES
    )


def _check(target: Target) -> str | None:
    if target.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this is {target.device.type}"
    if target.config.check_nan:
        return "check_nan waits for the device at every attention, which a recording cannot"
    if target.placement is not None and target.placement.unrecorded:
        return target.placement.unrecorded
    if not wanted(target):
        return "kernels take longer than launching them here; graphs='on' asks for it"
    return None


def wanted(target: Target) -> bool:
    """Whether graphs are asked for, or would win on the GPU here, or on any where there is none."""
    if target.config.graphs != "auto":
        return target.config.graphs == "on"
    here = target.device.type == "cuda" and torch.cuda.is_available()
    sm = torch.cuda.get_device_capability(target.device) if here else None
    facts = {"media": target.family and target.family.media, "quantised": quantises(target)}
    return all(wins(denoiser, sm=sm, **facts) for denoiser in target.denoisers.values())


def _apply(target: Target) -> None:
    from vivace.graph import Graphs

    for lane in target.lanes.values():
        budget = int(target.config.graph_gib * GIB / len(target.lanes))
        lane.run = Graphs(budget=budget)
        target.undo.callback(lane.run.clear)
    target.done("graphs", _forecast(target))


def _forecast(target: Target) -> str:
    return f"one per input signature, at most {target.config.graph_gib:g} GiB"


GRAPHS = Pass(
    name="graphs",
    why_here="last: it records what all the others made",
    wants=lambda config: config.graphs,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
