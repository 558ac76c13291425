"""Pass: CUDA graphs around the denoiser call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vivace.passes.target import Pass, Target

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rule:
    """On GPUs of compute capability `sm`, graphs win for denoisers of at most `parameters`."""

    sm: tuple[int, int]
    parameters: int


# Rows come from `vivace bench`; where none matches, graphs are used only on request.
RULES: tuple[Rule, ...] = ()


def _check(target: Target) -> str | None:
    if target.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this is {target.device.type}"
    if target.config.check_nan:
        return "check_nan waits for the device at every attention, which a recording cannot"
    if target.config.graphs == "auto":
        sm = torch.cuda.get_device_capability(target.device)
        size = max(sum(p.numel() for p in denoiser.parameters()) for denoiser in target.denoisers.values())
        if not any(rule.sm == sm and size <= rule.parameters for rule in RULES):
            return f"not measured to win for {size / 1e9:.1f} B parameters here; graphs='on' asks for it"
    return None


def _apply(target: Target) -> None:
    from vivace.graph import Graphs

    for lane in target.lanes.values():
        lane.run = Graphs(budget=int(target.config.graph_gib * GIB / len(target.lanes)))
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
