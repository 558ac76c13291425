"""Where the weights of a pipeline live within a budget of device memory: planned from bytes, before any is moved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vivace.errors import InputError

GIB = 2**30
SLOTS = 2
"""Blocks of a streamed module that are on the device: one computes while the next one comes."""
CONTEXT = GIB
"""Of a budget given in GB, what the CUDA context and the libraries take."""
SPARE = GIB // 4
"""What the allocator loses to fragments."""
BANDWIDTH = 25e9
"""Bytes a second from page-locked host memory to the device (PCIe 4.0 x16), where it was not measured."""

LEVELS = ("resident", "strips", "encoders", "parked", "streamed")
"""From the quickest to the smallest, each with what the ones before it do: everything on the device; the VAE decodes
strip by strip; text encoders come for their calls, block by block; of two experts one is parked; the denoiser's blocks
are streamed as far as there is no room for them."""

Kind = Literal["denoiser", "encoder", "vae", "other"]
FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component's bytes."""

    name: str
    kind: Kind
    held: int  # of weights outside of blocks, and of what stays of those that are streamed
    blocks: tuple[int, ...] = ()  # of each block's other weights, in the order of their calls
    work: int = 0  # beside the weights while it computes
    strip_work: int | None = None  # the same when it works strip by strip, where it can
    recorded: int = 0  # of `work`, what stays on the device in a CUDA graph, unless denoisers take turns

    @property
    def nbytes(self) -> int:
        return self.held + sum(self.blocks)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where one component's weights live."""

    part: Part
    streamed: tuple[int, ...] = ()  # blocks that come for their call alone
    leaves: bool = False  # whether the rest comes for the component's call alone, too

    @property
    def slots(self) -> int:
        return SLOTS * max((self.part.blocks[index] for index in self.streamed), default=0)

    @property
    def moved(self) -> int:
        """Bytes that a call moves to the device."""
        return sum(self.part.blocks[index] for index in self.streamed) + self.leaves * self.part.held

    @property
    def stays(self) -> int:
        """Bytes on the device while it computes."""
        return self.part.nbytes - sum(self.part.blocks[index] for index in self.streamed) + self.slots


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A plan. `str()` is its lines."""

    level: str
    budget: int | None  # None: not limited
    placed: tuple[Placed, ...]
    strips: bool = False  # the VAE works strip by strip
    parked: bool = False  # of several denoisers one at a time is on the device
    kept: int = 0  # bytes that a step cache holds during a request
    stock: str | None = None  # why the denoisers' blocks stay stock where some are streamed, None where they do not
    small: bool = False  # nothing is recorded: more of the denoiser stays on the device instead

    @property
    def resident(self) -> int:
        """Bytes of weights, and of slots for streamed ones, that are on the device all the time."""
        denoisers = [one.stays for one in self.placed if one.part.kind == "denoiser"]
        others = sum(one.stays for one in self.placed if one.part.kind != "denoiser" and not one.leaves)
        return others + (max(denoisers, default=0) if self.parked else sum(denoisers))

    @property
    def recorded(self) -> int:
        """Bytes that CUDA graphs of the denoisers' calls hold."""
        return 0 if self.parked else sum(one.part.recorded for one in self.placed)

    @property
    def peak(self) -> int:
        """The most bytes on the device at any moment, the context not counted."""
        return self.resident + max((self._extra(one) for one in self.placed), default=0) + self.kept + SPARE

    @property
    def moved_per_call(self) -> int:
        """Bytes that one denoiser call moves."""
        return max((one.moved for one in self.placed if one.part.kind == "denoiser"), default=0)

    @property
    def moved_per_image(self) -> int:
        """Bytes that move once per picture: text encoders, and experts that take turns."""
        once = sum(one.moved for one in self.placed if one.part.kind != "denoiser")
        denoisers = [one.stays - one.slots for one in self.placed if one.part.kind == "denoiser"]
        return once + (sum(denoisers) if self.parked else 0)

    @property
    def host(self) -> int:
        """Bytes of page-locked host memory."""
        return sum(one.part.nbytes for one in self.placed if one.streamed or one.leaves or self._parks(one))

    @property
    def streams(self) -> bool:
        """Whether blocks of a denoiser come for their own step alone."""
        return any(one.streamed for one in self.placed if one.part.kind == "denoiser")

    @property
    def moves(self) -> str | None:
        """Why weights of a denoiser are not always in one place, None where they are."""
        if self.parked:
            return "the denoisers take turns on the device"
        return "its blocks are streamed" if self.streams else None

    @property
    def unfused(self) -> str | None:
        """Why hand-fused blocks do not serve, None where they may."""
        return self.moves if self.parked else self.stock if self.streams else None

    @property
    def unrecorded(self) -> str | None:
        """Why nothing can be recorded, None where something may be."""
        if self.parked:
            return f"{self.moves}, and a recording would keep their first place"
        return "what a recording holds is better used for weights in this budget" if self.small else None

    def place_of(self, name: str) -> Placed:
        """Where the component of that name lives; KeyError where there is none."""
        return next(one for one in self.placed if one.part.name == name)

    def _parks(self, one: Placed) -> bool:
        return self.parked and one.part.kind == "denoiser"

    def _extra(self, one: Placed) -> int:
        """What is needed beside the residents while a component computes."""
        work = one.part.strip_work if self.strips and one.part.strip_work is not None else one.part.work
        # What one's own graph holds is the work that it needs; a call of another kind drops it where memory ends.
        return work + (one.stays if one.leaves else 0) + max(0, self.recorded - one.part.recorded)

    def __str__(self) -> str:
        lines = [f"{self.level}: peak {_gib(self.peak)}" + (f" of {_gib(self.budget)}" if self.budget else "")]
        for one in self.placed:
            size = _gib(one.part.nbytes)
            if one.streamed:
                where = f"{len(one.streamed)} of {len(one.part.blocks)} blocks streamed from the host"
            elif one.leaves:
                where = "on the device for its calls"
            else:
                where = "on the device, the other one parked on the host" if self._parks(one) else "on the device"
            lines.append(f"{one.part.name} {size}: {where}")
        if self.strips:
            lines.append("the VAE works strip by strip")
        if self.kept:
            lines.append(f"the step cache holds up to {_gib(self.kept)}")
        if self.recorded:
            lines.append(f"CUDA graphs hold {_gib(self.recorded)}")
        if self.moved_per_call:
            seconds = f"{self.moved_per_call / BANDWIDTH:.2f} s at {BANDWIDTH / 1e9:g} GB/s"
            lines.append(f"a denoiser call moves {_gib(self.moved_per_call)}: {seconds}")
        if self.moved_per_image:
            lines.append(f"a picture moves {_gib(self.moved_per_image)} once")
        return "\n".join(lines)


def budget_of(vram: str, *, free: int | None = None) -> int | None:
    """The bytes that `vram` allows, None for a level's name. `free` are the device's, for "auto".

    Raises InputError for what is neither a size, a level nor "auto".
    """
    if vram in LEVELS:
        return None
    if vram == "auto":
        if free is None:
            raise InputError("vram='auto' asks a GPU for its free memory, and there is none; give a size like 24GB")
        return free
    found = FORM.fullmatch(vram.strip())
    if found is None or float(found[1]) == 0:
        raise InputError(f"vram is a size like 24GB, auto, or a level ({', '.join(LEVELS)}); got {vram!r}")
    return int(float(found[1]) * GIB) - CONTEXT


def place(parts: Sequence[Part], *, budget: int | None, level: str | None = None, kept: int = 0) -> Placement:
    """The quickest placement that fits `budget` bytes, or the one that `level` names, beside `kept` bytes of a cache.

    Raises InputError, with the smallest budget that would do, where none fits.
    """
    candidates = _candidates(parts, kept=kept)
    if level is not None:
        return [one for one in candidates if LEVELS.index(one.level) <= LEVELS.index(level)][-1]
    assert budget is not None
    found = next((one for one in candidates if one.peak <= budget), None)
    if found is None:
        smallest = candidates[-1].peak + CONTEXT
        cache = f", {_gib(kept)} of it for its step cache" if kept else ""
        raise InputError(
            f"vram leaves {_gib(max(0, budget))} for this model, and the smallest plan needs "
            f"{_gib(candidates[-1].peak)}{cache}; give at least vram='{-(-smallest * 10 // GIB) / 10:g}GB'"
        )
    return replace(found, budget=budget)


def spread(count: int, *, of: int) -> list[int]:
    """`count` of `of` indices, as evenly as they go: before each streamed block others give its copy time."""
    return [(2 * index + 1) * of // (2 * count) for index in range(count)]


def _candidates(parts: Sequence[Part], *, kept: int) -> list[Placement]:
    """Every placement that is worth trying, the quickest first."""
    plan = Placement(level="resident", budget=None, placed=tuple(Placed(part=part) for part in parts), kept=kept)
    found = [plan]

    def then(level: str, changes: Mapping[str, Placed] | None = None, **fields: bool) -> None:
        placed = tuple((changes or {}).get(one.part.name, one) for one in found[-1].placed)
        found.append(replace(found[-1], level=level, placed=placed, **fields))

    if any(part.strip_work is not None for part in parts):
        then("strips", strips=True)
    encoders = [part for part in parts if part.kind == "encoder"]
    for part in sorted(encoders, key=lambda part: -part.nbytes):
        then("encoders", {part.name: Placed(part=part, streamed=tuple(range(len(part.blocks))), leaves=True)})
    denoisers = [part for part in parts if part.kind == "denoiser"]
    if len(denoisers) > 1:
        then("parked", parked=True)
    most = max((len(part.blocks) for part in denoisers), default=0)
    for count in range(1, most + 1):
        changed = {
            part.name: Placed(part=part, streamed=tuple(spread(min(count, len(part.blocks)), of=len(part.blocks))))
            for part in denoisers
        }
        then("streamed", changed)
    return found


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
