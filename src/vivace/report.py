"""`report`: what was done to a pipeline, what was left alone, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vivace.accelerate import acceleration_of
from vivace.config import plain, preset_name
from vivace.passes.attention import attention_of
from vivace.passes.target import Note
from vivace.quant.layers import Layer, condensed


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of one pipeline. `str()` is a table."""

    pipeline: str  # class name
    family: str | None  # None: the generic lane
    preset: str | None  # "custom" where no preset has these fields, None: not accelerated
    config: dict[str, Any]
    device: str
    dtype: str
    passes: tuple[Note, ...]
    replaced: tuple[str, ...]  # components that came later, in place of those that were accelerated
    attention: dict[str, dict[str, Any]]  # kind of layer -> how many, and what computes them
    layers: dict[str, tuple[Layer, ...]]  # denoiser -> its linears, where quantising came into question
    cache: dict[str, dict[str, Any]]  # denoiser -> calls computed and skipped, the time that saved, bytes held
    prompts: dict[str, int]  # encoded, found again, not looked for; bytes held
    calls: dict[str, dict[str, int]]  # denoiser -> what served, or why the stock forward did -> calls so far
    accelerate_seconds: float
    first_call_seconds: float | None  # None: not called yet
    weight_bytes: int  # of the denoisers
    peak_bytes: int | None  # highest allocation so far on a CUDA device

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.preset is None:
            return f"{self.pipeline}: not accelerated"
        family = self.family or "no known family, so the generic lane"
        lines = [f"{self.pipeline} ({family}), preset {self.preset}, {self.dtype} on {self.device}"]
        width = max((len(note.name) for note in self.passes), default=0)
        lines += [f"  {name} was replaced since and is stock: accelerate again" for name in self.replaced]
        lines += [f"  {n.name:<{width}}  {'done' if n.done else 'left'}  {n.detail}" for n in self.passes]
        for kind, use in self.attention.items():
            lines.append(f"  {kind} attention: {use['layers']} layers, {use['backend']}")
        lines += [f"  {name}.{line}" for name, layers in self.layers.items() for line in condensed(layers)]
        for name, calls in self.calls.items():
            lines += [f"  {name}: {count} calls, {served_by}" for served_by, count in calls.items()]
        lines += [f"  {name}: {_cached(found)}" for name, found in self.cache.items()]
        if self.prompts:
            lines.append(f"  prompts: {_remembered(self.prompts)}")
        first = "not called yet" if self.first_call_seconds is None else f"first call {self.first_call_seconds:.2f} s"
        lines.append(f"  cold start: accelerate {self.accelerate_seconds:.2f} s, {first}")
        peak = "" if self.peak_bytes is None else f", peak on the device {self.peak_bytes / 2**30:.2f} GiB"
        lines.append(f"  memory: weights {self.weight_bytes / 2**30:.2f} GiB{peak}")
        return "\n".join(lines)


def report(subject: Any) -> Report:
    """What `accelerate` did to a pipeline or denoiser, and what its calls met since."""
    acceleration = acceleration_of(subject)
    if acceleration is None:
        return _stock(subject)
    target = acceleration.target
    firsts = [lane.first_seconds for lane in target.lanes.values() if lane.first_seconds is not None]
    return Report(
        pipeline=type(target.subject).__name__,
        family=target.family.name if target.family else None,
        preset=preset_name(target.config),
        config=plain(target.config),
        device=str(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        passes=tuple(target.notes),
        replaced=tuple(target.replaced()),
        attention=attention_of(target),
        layers=dict(target.layers),
        cache={name: lane.cache.to_dict() for name, lane in target.lanes.items() if lane.cache is not None},
        prompts=target.prompts.to_dict() if target.prompts else {},
        calls={name: dict(lane.calls) for name, lane in target.lanes.items()},
        accelerate_seconds=acceleration.seconds,
        first_call_seconds=sum(firsts) if firsts else None,
        weight_bytes=sum(
            t.nbytes for denoiser in target.denoisers.values() for t in (*denoiser.parameters(), *denoiser.buffers())
        ),
        peak_bytes=torch.cuda.max_memory_allocated(target.device) if target.device.type == "cuda" else None,
    )


def _cached(found: dict[str, Any]) -> str:
    last = found["last_request"]
    of = last["computed"] + last["skipped"]
    idle = "".join(f"; {count} calls not asked about: {why}" for why, count in found["idle"].items())
    return (
        f"{last['skipped']} of {of} calls of the last request skipped, {last['saved_s']:.2f} s saved; "
        f"{found['hit_rate']:.0%} of {found['calls']} calls so far, {found['peak_bytes'] / 2**20:.1f} MiB held{idle}"
    )


def _remembered(prompts: dict[str, int]) -> str:
    known = f"{prompts['hits']} of {prompts['hits'] + prompts['computed']} found again"
    passed = f", {prompts['passed']} that nothing is remembered by" if prompts["passed"] else ""
    return f"{known}{passed}, {prompts['bytes'] / 2**20:.1f} MiB held"


def _stock(subject: Any) -> Report:
    return Report(
        pipeline=type(subject).__name__,
        family=None,
        preset=None,
        config={},
        device="",
        dtype="",
        passes=(),
        replaced=(),
        attention={},
        layers={},
        cache={},
        prompts={},
        calls={},
        accelerate_seconds=0.0,
        first_call_seconds=None,
        weight_bytes=0,
        peak_bytes=None,
    )
