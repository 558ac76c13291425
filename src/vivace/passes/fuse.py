"""Pass: hand-fused blocks in place of a family's stock ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vivace.attention.packed import Packed
from vivace.fused import Fused, fused_of
from vivace.kernels.language import triton
from vivace.kernels.rehearsal import rehearse, skeleton, without_values
from vivace.kernels.row import HeadScaled
from vivace.passes.target import Pass, Target, types_of
from vivace.quant.linear import QuantLinear
from vivace.request import Announce
from vivace.watch import replaced

if TYPE_CHECKING:
    from vivace.attention.backend import Attend
    from vivace.lane import Lane

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
SIDES = (256, 2048)
"""Pixels a side at which a model is rehearsed: between them lies every choice of kernel that depends on the size."""


def unfusable(denoiser: torch.nn.Module, fused: Fused, *, planned: bool = False) -> str | None:
    """Why the fused blocks would not compute what `denoiser` now computes; None when they do.

    A `planned` denoiser has shapes and no weights yet.

    They read weights and skip module calls, so every parameter must be a plain one and no module may carry a hook, a
    replaced forward, or a wrapper (an adapter, a parametrisation). Linears that we quantised are called, never read.
    """
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantLinear):
            continue
        if not type(module).__module__.startswith(("torch.nn.modules.", "diffusers.models.")):
            return f"{name or 'the denoiser'} is a {type(module).__module__}.{type(module).__name__}"
        first = (hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, Announce))
        if name and (replaced(module) or module._forward_hooks or any(first)):
            return f"{name} carries a hook"
        for parameter, value in module._parameters.items():
            if value is not None and type(value) is not torch.nn.Parameter:
                return f"{name}.{parameter} is a {type(value).__name__}"
            if value is not None and ((value.is_meta and not planned) or not value.dtype.is_floating_point):
                return f"{name}.{parameter} is offloaded or quantised"
    types = sorted(str(dtype).removeprefix("torch.") for dtype in types_of(denoiser))
    if len(types) > 1:
        return f"its weights are of several types, {' and '.join(types)}"
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
    if target.placement is not None and target.placement.unfused:
        return target.placement.unfused
    fused = fused_of(target.family)
    if fused is None:
        return f"no fused blocks for {target.family.name if target.family else 'an unknown family'}"
    if target.device.type not in DEVICES:
        return f"fused blocks are for {' and '.join(DEVICES)}, this is {target.device.type}"
    if target.device.type == "cuda" and triton is None:
        return "its kernels need Triton, which is not installed; pip install triton"
    planned = target.place is not None
    reasons = (unfusable(denoiser, fused, planned=planned) for denoiser in target.denoisers.values())
    return next(filter(None, reasons), None)


def _apply(target: Target) -> None:
    fused = fused_of(target.family)
    assert fused is not None
    stock = [f"{lane.name}: {why}" for lane in target.lanes.values() if (why := lane.fuse(fused)) is not None]
    if stock:
        # What a pass before this one hung on their layers, say.
        target.left("fuse", "; ".join(stock))
        return
    blocks = sum(len(lane.split.blocks) for lane in target.lanes.values() if lane.split)
    compiled = f"; {_compile_ahead(target, fused)}" if target.device.type == "cuda" else ""
    target.done("fuse", f"{blocks} blocks: {fused.summary}{compiled}")


def _compile_ahead(target: Target, fused: Fused) -> str:
    """Compile the kernels of the fused blocks now rather than in the first step; says how that went."""
    started = time.perf_counter()
    try:
        with torch.cuda.device(target.device):
            for lane in target.lanes.values():
                _rehearse(target, lane, fused)
    except Exception as error:
        # What a model's own code does without values cannot be foreseen, and the first step compiles as well.
        logger.warning("kernels will be compiled in the first step: %s", error)
        return f"kernels compile in the first step ({type(error).__name__}: {error})"
    return f"kernels compiled in {time.perf_counter() - started:.1f} s"


def _rehearse(target: Target, lane: Lane, fused: Fused) -> None:
    """Run a copy of the lane's denoiser without values, whose kernels compile instead of running."""
    family = target.family
    assert family is not None
    assert lane.split is not None
    largest = family.largest(lane.denoiser) if family.largest else max(SIDES)
    sides = sorted({min(side, largest) for side in SIDES})
    small = {"batch": 2, "frames": 1, "text_tokens": family.variant().text_tokens}
    shapes = [{"size": (side, side), **small} for side in sides] + [family.usual(lane.denoiser)]
    calls, foresight = [], lane.split.foresight
    for shape in shapes:
        kwargs = family.inputs(lane.denoiser, seed=0, **shape)
        if lane.split.once is not None:
            with torch.no_grad():
                kwargs["once"] = lane.split.prepare(kwargs)
        if foresight is not None and calls:  # a server's calls bring nothing made before
            kwargs["once"] = {**kwargs["once"], "made": foresight.like(kwargs["hidden_states"])}
        calls.append(without_values(kwargs))
    first = FirstCalls(lane.attend, device=target.device)
    with ExitStack() as undo:
        blocks = fused.fuse(skeleton(lane.denoiser), attend=first, undo=undo)
        rehearse(blocks, first.of_the_last(calls), meanwhile=first.make if target.placement is None else None)
    if isinstance(lane.attend, Packed):
        # Some steps and short calls stay in 16 bit.
        packed = replace(lane.attend, attend=first, heads=_shape_of_heads)
        with ExitStack() as undo:
            rehearse(fused.fuse(skeleton(lane.denoiser), attend=packed, undo=undo), calls)


class FirstCalls:
    """Attention without values, that is called with some by `make`: once for every shape that it met.

    cuDNN makes a plan of each, which takes half a second that the first step would wait for.
    """

    def __init__(self, attend: Attend, *, device: torch.device) -> None:
        self.attend, self.device = attend, device
        self._met: dict[Hashable, tuple[list[torch.Tensor], float | None]] = {}

    def __call__(self, q, k, v, *, mask=None, scale=None):
        if mask is None:
            self._met[(scale, *((t.shape, t.stride(), t.dtype) for t in (q, k, v)))] = [q, k, v], scale
        return torch.empty_like(q)

    def of_the_last(self, calls: Sequence[Any]) -> Iterator[Any]:
        """The calls, one by one; the last one's shapes alone are remembered."""
        yield from calls[:-1]
        self._met.clear()
        yield calls[-1]

    def make(self) -> None:
        for heads, scale in self._met.values():
            there = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device) for t in heads]
            # Zeros, since a guard against NaN may be around it.
            self.attend(*(t.zero_() for t in there), scale=scale)


def _shape_of_heads(operands, *, scale=None):
    return HeadScaled(torch.empty_like(operands.q), operands.v.scales)


def _forecast(target: Target) -> str:
    fused = fused_of(target.family)
    assert fused is not None
    return fused.summary


FUSE = Pass(
    name="fuse",
    why_here="after attention: it is built for one backend's layout",
    wants=lambda config: config.fuse,
    check=check_fuse,
    apply=_apply,
    forecast=_forecast,
)
