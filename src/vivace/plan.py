"""`plan`: what `accelerate` would do to a model, forecast from shapes alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vivace.bench.roofline import FASTEST
from vivace.cold_start import cold_start, told
from vivace.config import Config, plain, preset_name, resolve
from vivace.errors import InputError
from vivace.load import Source, find, pipeline_class, resolve_device, resolve_dtype
from vivace.passes.target import Note

if TYPE_CHECKING:
    import torch

    from vivace.passes.target import Target


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The forecast of a report. `str()` is a table."""

    model: str
    pipeline: str  # class name
    family: str | None  # None: the generic lane
    preset: str
    config: dict[str, Any]
    device: str
    dtype: str
    passes: tuple[Note, ...]
    attention: dict[str, dict[str, Any]]  # kind of layer -> how many, and what would compute them
    cold_start_seconds: tuple[float, float] | None  # from, to; None: not measured
    components: dict[str, int]  # bytes of each as loaded
    added_bytes: int  # that the passes add to them; below 0: save
    weight_bytes: int  # on the device, all components and passes together
    forward_tflop: float | None  # of one denoiser forward of the published model, at its own size
    forward_ms: float | None  # the least that takes at the rate measured on this GPU, in 16 bit
    slowdown: float | None  # of a denoiser call whose weights come from the host, at most; None: none come, or no TFLOP

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        family = self.family or "no known family, so the generic lane"
        lines = [f"{self.model}: {self.pipeline} ({family}), preset {self.preset}, {self.dtype} on {self.device}"]
        width = max(len(note.name) for note in self.passes)
        lines += [f"  {n.name:<{width}}  {'would do' if n.done else 'leaves  '}  {n.detail}" for n in self.passes]
        for kind, use in self.attention.items():
            lines.append(f"  {kind} attention: {use['layers']} layers, {use['backend']}")
        lines.append(f"  cold start: {told(self.cold_start_seconds)}")
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.components.items())
        change = f", passes {_gib(self.added_bytes)}" if self.added_bytes else ""
        lines.append(f"  memory: weights {_gib(self.weight_bytes)} ({parts}{change})")
        if self.forward_tflop:
            least = f", at least {self.forward_ms:.1f} ms in 16 bit here" if self.forward_ms else ""
            whose = "that" if self.forward_ms else f"a resident one's time on an {FASTEST}, and less on a slower GPU,"
            slower = f", up to {self.slowdown:.1f} times {whose} while its weights come" if self.slowdown else ""
            lines.append(f"  one denoiser forward: {self.forward_tflop:.2f} TFLOP{least}{slower}")
        return "\n".join(lines)


def plan(
    model: str | os.PathLike[str],
    preset: str | Config | Mapping[str, Any] = "exact",
    /,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **fields: Any,
) -> Plan:
    """What `accelerate(load(model), preset, **fields)` would do here, without reading a weight.

    `model` is what `load` takes, or a family that is known: "flux", "sd3:3.5-medium". Raises InputError for what
    cannot be found, and for what was asked for and cannot be done.
    """
    import torch

    from vivace.accelerate import wanted_passes
    from vivace.bench.roofline import RATES, rate_of
    from vivace.memory.placement import BANDWIDTH
    from vivace.memory.sizes import components_of, skeletons
    from vivace.passes import PASSES
    from vivace.passes.attention import attention_of

    config = resolve(preset, **fields)
    source = source_of(os.fspath(model))
    place = resolve_device(device)
    # A budget is a GPU's memory, also where there is no GPU to ask.
    number = torch.bfloat16 if config.vram and dtype is None and place.type == "cpu" else resolve_dtype(dtype, place)
    target = _target(source, config, skeletons(source, dtype=number), place=place)
    wanted = wanted_passes(target)
    for one in wanted:
        target.done(one.name, one.forecast(target))
    order = [one.name for one in PASSES]
    sizes = {name: part.nbytes for name, part in components_of(source, dtype=number).items()}
    added = sum(one.adds_bytes(target) for one in wanted)
    tflop = _tflop(source, dtype=number)
    rate = rate_of(torch.cuda.get_device_name(place) if place.type == "cuda" else None, "bf16")
    least = tflop / rate if tflop and rate else None  # seconds
    moved = target.placement.moved_per_call if target.placement else 0
    resident = least or (tflop / RATES[FASTEST].bf16 if tflop else None)  # a faster one waits the most for weights
    return Plan(
        model=source.name,
        pipeline=source.pipeline,
        family=source.family.name if source.family else None,
        preset=preset_name(config),
        config=plain(config),
        device=str(place),
        dtype=str(number).removeprefix("torch."),
        passes=tuple(sorted(target.notes, key=lambda note: order.index(note.name))),
        attention=attention_of(target),
        cold_start_seconds=cold_start(target),
        components=sizes,
        added_bytes=added,
        weight_bytes=sum(sizes.values()) + added,
        forward_tflop=tflop,
        forward_ms=least * 1e3 if least else None,
        slowdown=max(1.0, moved / BANDWIDTH / resident) if moved and resident else None,
    )


def source_of(model: str) -> Source:
    """The source that `model` names, or the published model that `FAMILY[:variant]` is."""
    from vivace.families import FAMILIES

    name, _, variant_name = model.partition(":")
    if name not in FAMILIES or os.path.exists(model):
        return find(model)
    family = FAMILIES[name]
    variant = family.variant(variant_name or None)
    pipeline = variant.pipeline or family.pipelines[0]
    return Source(name=model, path=None, pipeline=pipeline, family=family, variant=variant)


def _target(source: Source, config: Config, parts: dict[str, torch.nn.Module], *, place: torch.device) -> Target:
    from vivace.accelerate import DENOISER_NAMES
    from vivace.passes.target import Target
    from vivace.quant import folder

    names = source.family.denoisers if source.family else DENOISER_NAMES
    denoisers = {name: parts[name] for name in names if name in parts}
    if not denoisers:
        raise InputError(
            f"the denoiser of {source.name} is not known before it is loaded; give a local folder, or a model that "
            "vivace families lists"
        )
    for name, denoiser in denoisers.items():
        if source.path is not None and folder.holds(source.path / name):
            folder.put_shapes(denoiser, source.path / name)
    return Target(
        subject=SimpleNamespace(**parts),
        family=source.family,
        config=config,
        denoisers=denoisers,
        pipeline=pipeline_class(source),
        place=place,
    )


def _tflop(source: Source, *, dtype: torch.dtype) -> float | None:
    """Operations of one forward, where the model is one of the published ones."""
    if source.family is None or source.variant is None or source.path is not None:
        return None
    from vivace.bench.flops import tflop
    from vivace.bench.workload import workload_of

    variant = next(name for name, variant in source.family.variants.items() if variant is source.variant)
    number = str(dtype).removeprefix("torch.")
    return tflop(workload_of(f"{source.family.name}:{variant}", device="cpu", dtype=number))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
