"""What few bits cost one denoiser: the relative error of every kind of layer, and of a whole forward."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from vivace.accelerate import accelerate, restore
from vivace.attention import backend_of
from vivace.attention.error import attention_errors
from vivace.bench.subject import build, inputs_of
from vivace.bench.workload import Workload
from vivace.errors import InputError
from vivace.quant import format_of
from vivace.quant.error import by_kind, layer_errors
from vivace.quant.layers import linears, survey
from vivace.quant.linear import QuantLinear


def errors_of(workload: Workload, *, quant: str | None, attention: str | None) -> dict[str, dict[str, float]]:
    """`{"quant=fp8": {kind of layer: worst error, ..., "whole forward": error}, "attention=...": ...}`.

    Errors are against the same model in its own type, on the workload's inputs. Raises InputError for what the device
    cannot do, before anything is built, and for `quant` of a model that came in few bits.
    """
    family, device, dtype = workload.facts, torch.device(workload.device), getattr(torch, workload.dtype)
    reasons = {
        f"quant={quant!r}": format_of(quant).refuses(device) if quant else None,
        f"attention={attention!r}": backend_of(attention).refuses(device=device, dtype=dtype) if attention else None,
    }
    for asked, reason in reasons.items():
        if reason:
            raise InputError(f"{asked} cannot be done here: {reason}")
    denoiser = build(workload)
    if quant and any(isinstance(module, QuantLinear) for _, module in linears(denoiser)):
        raise InputError(f"{workload.model} came in few bits, so what they cost cannot be told; give it in 16 bit")
    arguments = inputs_of(denoiser, workload)
    exact = _called(denoiser, arguments)
    found = {}
    if quant:
        chosen = {"keep": family.keep_16bit, "one_row": family.one_row, "all_that_fit": True}
        layers = survey(denoiser, format=format_of(quant), device=device, **chosen)
        found[f"quant={quant}"] = by_kind(layer_errors(denoiser, arguments, layers=layers))
    if attention:
        errors = attention_errors(denoiser, arguments, backend=backend_of(attention))
        found[f"attention={attention}"] = by_kind(errors)
    fields = {"quant": quant or "off", "attention": attention or "auto"}
    for asked, kinds in found.items():
        name = asked.partition("=")[0]
        kinds["whole forward"] = _whole(denoiser, arguments, exact, **{name: fields[name]})
    if len(found) == 2:
        found["both"] = {"whole forward": _whole(denoiser, arguments, exact, **fields)}
    return found


def _whole(denoiser: Any, arguments: dict[str, Any], exact: torch.Tensor, **fields: Any) -> float:
    accelerate(denoiser, keep_base="host", **fields)
    try:
        return ((_called(denoiser, arguments) - exact).norm() / exact.norm()).item()
    finally:
        restore(denoiser)


def _called(denoiser: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        leaves = tree_leaves(denoiser(**arguments))
    return torch.cat([leaf.float().flatten() for leaf in leaves if isinstance(leaf, torch.Tensor)])
