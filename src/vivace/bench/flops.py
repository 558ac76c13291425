"""Floating-point operations of a denoiser forward, counted on shapes alone."""

from __future__ import annotations

from dataclasses import replace

from vivace.bench.subject import build, inputs_of
from vivace.bench.workload import Workload
from vivace.load import find
from vivace.memory.sizes import skeletons


def tflop(workload: Workload) -> float:
    """Operations of one denoiser forward, in 10^12; a multiplication and an addition are two.

    Nothing is allocated but the inputs, on the CPU.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shapes = replace(workload, device="cpu", model=None, end_to_end=False)
    dtype = getattr(torch, workload.dtype)
    if workload.tiny:
        denoiser = build(shapes).to("meta")
    elif workload.model:
        denoiser = skeletons(find(workload.model), dtype=dtype)[workload.facts.denoisers[0]]
    else:
        denoiser = workload.facts.full(workload.variant, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**inputs_of(denoiser, shapes))
    return counter.get_total_flops() / 1e12
