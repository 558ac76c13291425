"""Contestants draw the same prompts from the same noise: presets and caches, beside a floor and two controls.

A figure of quality means something only beside the floor, the exact maths run another way, and beside what the same
time buys without us: the same solver with fewer steps, and the best solvers with fewer steps.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from vivace.accelerate import accelerate, acceleration_of, restore
from vivace.bench.clock import wall
from vivace.cache.calibration import digest_of
from vivace.config import PRESETS, Config
from vivace.errors import InputError
from vivace.evals.sample import draw, final_latents
from vivace.evals.store import Record, Store, key_of
from vivace.fingerprint import fingerprint
from vivace.load import Source
from vivace.scheduler import use_scheduler

logger = logging.getLogger(__name__)

Role = Literal["reference", "floor", "candidate", "control"]
SOLVERS = ("unipc", "dpmsolvermultistep")
"""The best solvers that few steps can be spent with."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to draw the prompts."""

    name: str
    role: Role
    config: Config | None  # None: stock diffusers
    steps: int
    scheduler: str | None = None  # None: the pipeline's own
    batch: int = 1

    @cached_property
    def calibration(self) -> str:
        """What the calibration holds that its cache reads, which the Config only names; empty where it reads none."""
        return digest_of(self.config.cache) if self.config and self.config.cache else ""

    def settings(self, contest: Contest) -> dict[str, Any]:
        """Everything that decides its pictures and times, as plain values."""
        return {
            "config": repr(self.config), "calibration": self.calibration, "steps": self.steps,
            "scheduler": self.scheduler, "batch": self.batch,
            "model": contest.model, "contents": contest.contents, "seed": contest.seed, "call": contest.call,
            "place": contest.place,
        }  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Contest:
    """A pipeline, the prompts, and where the drawings go; process `rank` of `ranks` draws its share of them."""

    pipe: Any
    model: str
    prediction: str  # of the family: "epsilon", "v", "flow"
    prompts: Sequence[str]
    store: Store
    steps: int
    seed: int = 0
    call: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1
    together: Callable[[Contestant], None] = lambda contestant: None  # waits for the other processes' share of it
    tell: Callable[[str], None] = lambda line: None
    contents: str = ""  # fingerprint of the model's files, where they are known
    place: str = ""  # device and type that times and pictures hold for: the pipeline's
    device: torch.device | None = None  # where it computes, offloaded or not: the pipeline's

    def __post_init__(self) -> None:
        self.place = self.place or place_of(self.pipe)
        self.device = self.device or (self.pipe.device if self.pipe is not None else None)

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU; not always the one that this process has for its current one."""
        return self.device is not None and self.device.type == "cuda"

    def run(self, contestant: Contestant) -> None:
        """Draw what is missing of this process's prompts; raises InputError where the contestant cannot be."""
        # In pairs and the like a drawing has its partners, so that shares go by whole batches.
        batches = [
            range(first, min(first + contestant.batch, len(self.prompts)))
            for first in range(0, len(self.prompts), contestant.batch)
        ][self.rank :: self.ranks]
        records = self.store.records()
        known = {
            index
            for index in range(len(self.prompts))
            if self.store.holds(records.get((contestant.name, index)), key=self.key(contestant, index))
        }
        missing = [batch for batch in batches if not known.issuperset(batch)]
        if missing:
            self._say_stale(contestant, [records.get((contestant.name, index)) for batch in missing for index in batch])
            stock = self.pipe.scheduler
            try:
                self._prepare(contestant)
                # Once unmeasured: the first run compiles, records and fills pools.
                self._draw(contestant, missing[0])
                for number, batch in enumerate(missing):
                    self.tell(f"{contestant.name}: {number + 1} of {len(missing)}")
                    self._keep(contestant, batch)
            finally:
                restore(self.pipe)
                self.pipe.scheduler = stock
        self.together(contestant)

    def check(self, contestant: Contestant) -> None:
        """Raises InputError where the contestant cannot be, without drawing anything."""
        stock = self.pipe.scheduler
        try:
            self._prepare(contestant)
        finally:
            restore(self.pipe)
            self.pipe.scheduler = stock

    def floor(self, reference: Contestant) -> Contestant:
        """The noise floor, drawn: in pairs, or one by one where two need more memory than there is."""
        pairs = floor_of(reference)
        try:
            self.run(pairs)
        except InputError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError) or self.ranks > 1:
                raise
            logger.warning("two prompts at a time need more memory than there is; the floor is drawn one by one")
        else:
            return pairs
        alone = floor_of(reference, batch=1)
        self.run(alone)
        return alone

    def seconds(self, contestant: Contestant) -> float:
        """Median seconds a picture, of what was drawn with these settings by whichever process."""
        return median(r.seconds for r in self.of(contestant) if r.seconds is not None)

    def of(self, contestant: Contestant) -> list[Record]:
        """The records of a contestant as it is set now, in the prompts' order."""
        records = self.store.records()
        found = [(records.get((contestant.name, index)), index) for index in range(len(self.prompts))]
        return [one for one, index in found if one is not None and one.key == self.key(contestant, index)]

    def key(self, contestant: Contestant, index: int) -> str:
        """What a drawing is known by: a digest of all that decides it."""
        return key_of({**contestant.settings(self), "prompt": self.prompts[index]})

    def _say_stale(self, contestant: Contestant, kept: Sequence[Record | None]) -> None:
        """Say what differs in drawings that are there and do not count any more."""
        asked = json.loads(json.dumps(contestant.settings(self), default=str))
        other: dict[str, int] = {}
        for record in kept:
            if record is not None and record.index < len(self.prompts):
                names = [name for name, value in asked.items() if record.settings.get(name) != value]
                names += ["prompt"] if record.prompt != self.prompts[record.index] else []
                for name in names:
                    other[name] = other.get(name, 0) + 1
        if other:
            told = ", ".join(f"another {name} ({count})" for name, count in other.items())
            logger.warning("%s: kept drawings were made with %s; drawing them anew", contestant.name, told)

    def _prepare(self, contestant: Contestant) -> None:
        restore(self.pipe)
        if contestant.scheduler:
            use_scheduler(self.pipe, contestant.scheduler, prediction=self.prediction)
        if contestant.config is not None:
            accelerate(self.pipe, contestant.config)

    def _keep(self, contestant: Contestant, batch: range) -> None:
        latents, pictures, seconds = self._draw(contestant, batch)
        for place, index in enumerate(batch):
            record = Record(
                contestant=contestant.name, index=index, prompt=self.prompts[index], seed=self.seed + index,
                key=self.key(contestant, index), settings=contestant.settings(self),
                seconds=seconds if contestant.batch == 1 else None, computed=_computed(self.pipe),
                peak_bytes=torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None,
            )  # fmt: skip
            frames = pictures[place]
            self.store.keep(record, latents=latents[place], frames=frames if frames.ndim == 4 else frames[None])

    def _draw(self, contestant: Contestant, batch: range) -> tuple[torch.Tensor, torch.Tensor, float]:
        prompts, seeds = [self.prompts[index] for index in batch], [self.seed + index for index in batch]
        assert self.device is not None
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        one = partial(draw, self.pipe, prompts, steps=contestant.steps, seeds=seeds, output_type="pt", **self.call)
        try:
            with final_latents(self.pipe.scheduler) as latents:
                seconds, pictures = wall(one, self.device)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{contestant.name} needs more memory than there is; leave it out, or take a smaller size"
            ) from error
        # Rounded to 8 bits NaN would be black, and a black picture is as near to another as can be.
        if not (latents[0].isfinite().all() and pictures.isfinite().all()):
            raise InputError(
                f"{contestant.name} draws numbers that are not finite, of which no distance can be told; leave it out, "
                "or look for the layer with check_nan=True"
            )
        return latents[0].float(), pictures.float(), seconds


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be drawn, of what and into which folder: all that the processes of one comparison are told."""

    model: str
    contents: str  # fingerprint of the model's files
    folder: Path
    prompts: tuple[str, ...]
    steps: int
    seed: int
    call: Mapping[str, Any]
    presets: Sequence[str] = ()
    configs: Mapping[str, Config] = field(default_factory=dict)
    ranks: int = 1
    device: str | None = None

    def contest(self, pipe: Any, *, prediction: str, rank: int = 0, **fields: Any) -> Contest:
        """The share of process `rank`; `pipe` is None where nothing is drawn. `fields` are further ones of Contest."""
        return Contest(
            pipe=pipe, model=self.model, contents=self.contents, prediction=prediction, prompts=self.prompts,
            store=Store(self.folder, rank=rank), steps=self.steps, seed=self.seed, call=self.call,
            rank=rank, ranks=self.ranks, **fields,
        )  # fmt: skip


def place_of(pipe: Any) -> str:
    """The device a pipeline is on, by its name, and its type."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {str(pipe.dtype).removeprefix('torch.')}"


def contents_of(source: Source) -> str:
    """The fingerprint of a model's files, which tells one kept drawing from another's; empty for a hub id."""
    return "" if source.path is None else fingerprint(source.path)


def contestants(
    *, presets: Sequence[str], configs: Mapping[str, Config], steps: int
) -> tuple[Contestant, list[Contestant]]:
    """The reference, which is the first preset, and the candidates: the other presets and named configurations."""
    for name in presets:
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    if not presets:
        raise InputError("--presets needs at least the reference; for example exact")
    reference = Contestant(name=presets[0], role="reference", config=PRESETS[presets[0]], steps=steps)
    named = {**{name: PRESETS[name] for name in presets[1:]}, **configs}
    clash = {reference.name} & set(named)
    if clash:
        raise InputError(f"{', '.join(clash)} is the reference and a candidate too; name it once")
    return reference, [Contestant(name=n, role="candidate", config=c, steps=steps) for n, c in named.items()]


def floor_of(reference: Contestant, *, batch: int = 2) -> Contestant:
    """The exact maths run another way: stock diffusers, two prompts at a time or, with other kernels still, one."""
    name = f"floor: stock, {'in pairs' if batch == 2 else 'one by one'}"
    return Contestant(name=name, role="floor", config=None, steps=reference.steps, batch=batch)


def controls_of(contest: Contest, reference: Contestant, candidates: Sequence[Contestant]) -> list[Contestant]:
    """For every candidate's time, the reference with as many steps as that time allows, and the best solvers."""
    whole = contest.seconds(reference)
    found: dict[str, Contestant] = {}
    for candidate in candidates:
        steps = steps_within(contest.seconds(candidate) / whole, of=reference.steps)
        if steps >= reference.steps:
            continue
        for solver in (None, *SOLVERS):
            if solver is not None and not _takes(contest, solver):
                continue
            name = f"{solver or 'same solver'}, {steps} steps"
            found[name] = Contestant(name=name, role="control", config=reference.config, steps=steps, scheduler=solver)
    return list(found.values())


def steps_within(share: float, *, of: int) -> int:
    """Steps that a control has in a share of the time of a run `of` so many: rounded up, it is given the benefit."""
    return max(1, math.ceil(of * share - 0.05))


def _takes(contest: Contest, solver: str) -> bool:
    """Whether the pipeline's model can be run by that solver."""
    stock = contest.pipe.scheduler
    try:
        use_scheduler(contest.pipe, solver, prediction=contest.prediction)
    except InputError:
        return False
    finally:
        contest.pipe.scheduler = stock
    return True


def _computed(pipe: Any) -> float | None:
    acceleration = acceleration_of(pipe)
    lanes = acceleration.target.lanes.values() if acceleration else ()
    counts = [lane.cache.tally.last for lane in lanes if lane.cache is not None]
    calls = sum(count.computed + count.skipped for count in counts)
    return sum(count.computed for count in counts) / calls if calls else None
