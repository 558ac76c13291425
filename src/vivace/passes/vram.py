"""Pass: weights placed within a budget of device memory, and a decode that does not lose its latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, product
from types import MappingProxyType
from typing import Any

import torch

from vivace.config import Config
from vivace.errors import InputError
from vivace.fused import Fused, fused_of
from vivace.inputs import encodes
from vivace.memory import strips
from vivace.memory.decode import FRAMES, rescue, tiles
from vivace.memory.footprint import denoiser_work, work
from vivace.memory.joined import planning
from vivace.memory.pinned import available, gib
from vivace.memory.placement import BANDWIDTH, GIB, LEVELS, Part, Placed, Placement, budget_of, place
from vivace.memory.stream import Stream, Turn, tensors_of
from vivace.one_off import give_class
from vivace.passes import graphs
from vivace.passes.cache import held_by
from vivace.passes.fuse import check_fuse
from vivace.passes.quantize import savings
from vivace.passes.target import Pass, Target, hooks_of, repeating_lists, uncompiled

LARGE = 0.1
"""The share of a module from which on a block comes in parts: two of them have to be on the device."""
TILE = 32
"""Latent rows and columns of a stock tile."""
NOTHING: Mapping[int, int] = MappingProxyType({})
TOO_SMALL = "the budget is too small for what its fused blocks keep on the device"
UNKNOWN = GIB
"""Work of a module that says nothing on shapes alone."""


def device_for(config: Config) -> torch.device | None:
    """The GPU whose memory a budget is for; None without a budget, and where there is no GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if config.vram and torch.cuda.is_available() else None


def _check(target: Target) -> str | None:
    vram, device = target.config.vram, target.place
    if vram is None:
        return None if _vae(target) is not None else "no budget was given, and there is no VAE"
    if device is None:
        return "it plans the memory of a GPU, and there is none here"
    for name, module in _modules(target).items():
        if hasattr(module, "_hf_hook") or hooks_of(module):
            return f"the {name} carries offload hooks already; pipe.remove_all_hooks() takes them off"
        if uncompiled(module) is not module:
            return f"the {name} is compiled already, which nothing can place; put `pipe.{name}._orig_mod` in its place"
    level = vram if vram in LEVELS else None
    target.placement = planned(target, budget=_budget(target, vram, device), level=level)
    # A plan made where there is no GPU is for another machine.
    elsewhere = device.type == "cpu" and all(p.is_meta for m in target.denoisers.values() for p in m.parameters())
    room = None if elsewhere else available()
    if room is not None and target.placement.host > room + _on_host(target):
        return f"{gib(target.placement.host)} of host memory are needed, and {gib(room)} are free; give a larger vram="
    return None


def _apply(target: Target) -> None:
    vae, plan = _vae(target), target.placement
    if plan is None:
        target.undo.callback(rescue(vae, release=_release(target)))
        target.done("vram", "weights where they were; a decode that runs out of memory goes on in strips")
        return
    assert target.place is not None
    turn = Turn() if plan.parked else None
    for one in plan.placed:
        module = _modules(target)[one.part.name]
        if one.streamed or one.leaves or (turn is not None and one.part.kind == "denoiser"):
            _stream(target, module, one, turn=turn if one.part.kind == "denoiser" else None)
        else:
            _move(target, module)
    for lane in target.lanes.values():
        lane.place(target.place, moves=plan.parked, streams=plan.streams)
    if vae is not None:
        target.undo.callback(rescue(vae, in_strips=plan.strips, room=_room(target), release=_release(target)))
    if target.subject not in target.denoisers.values():
        here = property(lambda _: target.place)
        target.undo.callback(give_class(target.subject, {"_execution_device": here, "device": here}))
    target.done("vram", "; ".join(str(plan).splitlines()))


def _stream(target: Target, module: Any, one: Placed, *, turn: Turn | None) -> None:
    assert target.place is not None
    lane, fused = target.lanes.get(one.part.name), _fused(target)
    kept, joined = set[int](), list[list[torch.Tensor]]()
    if lane is not None and fused is not None and one.streamed:
        kept = kept_of(module, fused)
        with planning() as joined:
            fused.fuse(module, attend=lane.attend, undo=ExitStack())
    stream = Stream(
        module,
        blocks=blocks_of(module),
        streamed=one.streamed,
        device=target.place,
        kept=kept,
        joined=joined,
        stay="call" if one.leaves else "turn" if turn is not None else "always",
        turn=turn,
        in_parts=lane is not None,
    )
    stream.install(undo=target.undo)
    if lane is not None and lane.adapters is not None:
        lane.adapters.writing = stream.writing


def _move(target: Target, module: Any) -> None:
    before = next((parameter.device for parameter in module.parameters()), target.place)
    if before != target.place:
        module.to(target.place)
        target.undo.callback(module.to, before)


def planned(target: Target, *, budget: int | None, level: str | None = None) -> Placement:
    """The quickest placement: with fused blocks, and with room for recordings, where that fits.

    Blocks that take longer to come than to launch leave a recording nothing to save: then weights have its room.
    Raises InputError, with the smallest budget that would do, where none fits.
    """
    saved, config, kept = savings(target), target.config, held_by(target)
    parts = parts_of(target, saved=saved)
    stock = check_fuse(target) or _unstreamed(target)
    forms = [(stock, parts)]
    if stock is None:
        forms = [(None, [_for_fused(target, part, saved) for part in parts])]
        forms += [(TOO_SMALL, parts)] * (config.fuse != "on")
    recorded = any(part.recorded for part in parts)
    ways = list(product(forms, (False, True) if recorded and config.graphs != "on" else (False,)))
    for way in ways:
        (stock, parts), small = way
        parts = [replace(part, recorded=0) for part in parts] if small else parts
        try:
            found = replace(place(parts, budget=budget, level=level, kept=kept), stock=stock, small=small)
        except InputError:
            if way is ways[-1]:
                raise
            continue
        copying = found.moved_per_call / BANDWIDTH
        if small or way is ways[-1] or config.graphs == "on" or copying < graphs.LAUNCHED:
            return found
    raise AssertionError("the last way is a placement or an error")


def _unstreamed(target: Target) -> str | None:
    """Why the blocks of fused families stay stock where they are streamed, or None."""
    if len(target.denoisers) > 1:
        return "the denoisers take turns on the device"
    fused = fused_of(target.family)
    return "its fused blocks read each other's weights" if fused is None or fused.outside is None else None


def _fused(target: Target) -> Fused | None:
    """The fused blocks that serve where blocks are streamed."""
    return fused_of(target.family) if target.placement and target.placement.unfused is None else None


def kept_of(module: torch.nn.Module, fused: Fused) -> set[int]:
    """The ids of what stays on the device of streamed blocks: vectors, which are small, and what others read."""
    assert fused.outside is not None
    outside = [[one] if isinstance(one, torch.Tensor) else tensors_of(one) for one in fused.outside(module)]
    vectors = [tensor for tensor in tensors_of(module) if sum(size > 1 for size in tensor.shape) < 2]
    return {id(tensor) for tensor in chain(vectors, *outside)}


def _for_fused(target: Target, part: Part, saved: Mapping[int, int]) -> Part:
    """A denoiser's part with less of its blocks to be streamed."""
    module, fused = target.denoisers.get(part.name), fused_of(target.family)
    if module is None or fused is None:
        return part
    kept = kept_of(module, fused)
    blocks = tuple(_nbytes(block, saved, kept=kept) for block in blocks_of(module, saved))
    return replace(part, blocks=blocks, held=part.nbytes - sum(blocks))


def parts_of(target: Target, *, saved: Mapping[int, int] | None = None) -> list[Part]:
    """The bytes of a pipeline's components: weights as they will be, and the work of a request of the model's size.

    `saved` is what quantising will take off the modules of these ids; None: to be found.
    """
    parts, graphed = [], graphs.wanted(target) and not target.config.check_nan
    saved = savings(target) if saved is None else saved
    for name, module in _modules(target).items():
        kind = "denoiser" if name in target.denoisers else "vae" if name == "vae" else _kind(name)
        blocks = tuple(_nbytes(block, saved) for block in blocks_of(module, saved))
        found, small = _work(target, kind, module)
        held = _nbytes(module, saved) - sum(blocks)
        recorded = found if kind == "denoiser" and graphed else 0
        parts.append(
            Part(name=name, kind=kind, held=held, blocks=blocks, work=found, strip_work=small, recorded=recorded)
        )
    return parts


def blocks_of(module: torch.nn.Module, saved: Mapping[int, int] = NOTHING) -> list[torch.nn.Module]:
    """The blocks that can come one by one: the repeated ones, a large one in its own repeated parts.

    `saved` is what quantising will take off the modules of these ids.
    """
    limit, found = _nbytes(module, saved) * LARGE, list[torch.nn.Module]()
    for name in repeating_lists(module):
        for block in module.get_submodule(name).children():
            inner = blocks_of(block, saved) if _nbytes(block, saved) > limit else []
            found += inner or [block]
    return found


def _kind(name: str) -> Any:
    return "encoder" if "encoder" in name else "other"


def _modules(target: Target) -> dict[str, torch.nn.Module]:
    """The components that have weights, the denoisers first."""
    if target.subject in target.denoisers.values():
        return dict(target.denoisers)
    others = getattr(target.subject, "components", None) or vars(target.subject)
    found = {name: module for name, module in others.items() if isinstance(module, torch.nn.Module)}
    return {**target.denoisers, **found}


def _vae(target: Target) -> Any:
    vae = uncompiled(_modules(target).get("vae"))
    return vae if hasattr(vae, "decode") else None


def _work(target: Target, kind: str, module: Any) -> tuple[int, int | None]:
    """What a component needs beside its weights, and what of it when it works in strips."""
    family = target.family
    if kind == "denoiser" and family is not None:
        return denoiser_work(module, family.inputs, **family.usual(module)) or UNKNOWN, None
    if kind == "vae" and hasattr(module, "decode"):
        return _vae_work(target, module)
    return min(GIB // 2, _nbytes(module) // 8 + GIB // 16), None


def _vae_work(target: Target, vae: Any) -> tuple[int, int | None]:
    family = target.family
    denoiser: Any = next(iter(target.denoisers.values()))
    variant = family.nearest(denoiser.config) if family else None
    (width, height), frames = (variant.size, variant.frames) if variant else ((1024, 1024), 1)
    size = {"width": width, "height": height, "frames": frames}
    whole, small = _decode_work(target, vae, **size)
    encode = _encode_work(vae, **size) if target.pipeline and encodes(target.pipeline) else 0
    return max(whole, encode), None if small is None else max(small, encode)


def _decode_work(target: Target, vae: Any, *, width: int, height: int, frames: int) -> tuple[int, int | None]:
    z = _latents(target, vae, width=width, height=height)
    if "num_frames" in inspect.signature(vae.decode).parameters:
        several = [(count, z.expand(count, *z.shape[1:])) for count in (frames, min(frames, FRAMES))]
        whole, small = (work(vae, "decode", z=some, num_frames=count) or UNKNOWN for count, some in several)
        result = 3 * width * height * frames * (vae.dtype.itemsize + torch.float32.itemsize)
        return whole + result, small + result
    doubled = _widened(vae)
    # The VAEs of videos decode frame after frame: what grows with their number is the result, and its copy.
    result = 2 * 3 * width * height * frames * vae.dtype.itemsize
    whole = doubled * (result + (work(vae, "decode", z=z) or UNKNOWN))
    if strips.refuses(vae) is None:
        return whole, min(whole, doubled * strips.work(vae, width=width, height=height))
    if not tiles(vae):
        return whole, None
    tile = z[..., :TILE, :TILE]
    return whole, min(whole, doubled * (result + (work(vae, "decode", z=tile) or UNKNOWN)))


def _encode_work(vae: Any, *, width: int, height: int, frames: int) -> int:
    """Of the picture that a call brings, or of a video, the first of whose frames comes alone, the others by fours."""
    video = vae.config.get("z_dim") is not None
    some = (min(frames, 5),) if video else ()
    x = torch.empty(1, 3, *some, height, width, device="meta", dtype=vae.dtype)
    brought = 3 * width * height * (frames if video else 1) * vae.dtype.itemsize
    return _widened(vae) * (brought + (work(vae, "encode", x=x) or UNKNOWN))


def _widened(vae: Any) -> int:
    # In half precision SDXL's VAE overflows, so its pipeline takes it in full.
    return 2 if vae.dtype == torch.float16 and vae.config.get("force_upcast") else 1


def _latents(target: Target, vae: Any, *, width: int, height: int) -> torch.Tensor:
    """The shape that the VAE decodes for one picture, or for the first frames of a video."""
    config = vae.config
    scale = getattr(target.subject, "vae_scale_factor_spatial", None) or config.get("scale_factor_spatial") or 8
    channels = config.get("z_dim") or config.get("latent_channels")
    # The VAEs of videos take frames, also where they make single pictures.
    time = (2,) if "z_dim" in config else ()
    return torch.empty(1, channels, *time, height // scale, width // scale, device="meta", dtype=vae.dtype)


def _budget(target: Target, vram: str, device: torch.device) -> int | None:
    if device.type != "cuda" or vram != "auto":
        return budget_of(vram)
    free, _ = torch.cuda.mem_get_info(device)
    ours = sum(_nbytes(m) for m in _modules(target).values() if next(iter(m.parameters())).device.type == "cuda")
    return budget_of(vram, free=free + ours)


def _room(target: Target) -> Any:
    plan = target.placement
    assert plan is not None
    if plan.budget is None:
        return None
    budget = plan.budget
    return lambda: budget - torch.cuda.memory_allocated(target.place)


def _release(target: Target) -> Callable[[], None]:
    """Drops what is recorded of the denoisers: it is recorded again when it is next called."""

    def release() -> None:
        for lane in target.lanes.values():
            lane.run.clear()

    return release


def _on_host(target: Target) -> int:
    return sum(p.nbytes for module in _modules(target).values() for p in module.parameters() if p.device.type == "cpu")


def _nbytes(module: torch.nn.Module, saved: Mapping[int, int] = NOTHING, *, kept: Collection[int] = ()) -> int:
    """Bytes of a module's weights, but for those that are `kept`."""
    counted = (part for part in module.modules() if id(getattr(part, "weight", None)) not in kept) if saved else ()
    off = sum(saved.get(id(part), 0) for part in counted)
    return sum(tensor.nbytes for tensor in tensors_of(module) if id(tensor) not in kept) - off


def _forecast(target: Target) -> str:
    plan = target.placement
    return "; ".join(str(plan).splitlines()) if plan else "weights stay; a decode out of memory goes on in strips"


VRAM = Pass(
    name="vram",
    why_here="before fuse: fused weights are built where they will stay; after what changes their bytes",
    wants=lambda config: "auto" if config.vram is None else "on",
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
