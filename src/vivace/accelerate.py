"""`accelerate` and `restore`: resolve the family, check every wanted pass, apply them in order, keep the undos."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vivace.config import Config, plain, resolve
from vivace.errors import InputError
from vivace.family import Family, known_family
from vivace.lane import Lane
from vivace.lora.adapters import held_out
from vivace.passes import PASSES
from vivace.passes.attention import names_blocks
from vivace.passes.lora import lora_methods
from vivace.passes.target import Note, Pass, Target, hooks_of, in_inference
from vivace.passes.vram import device_for
from vivace.quant.originals import Base
from vivace.request import scope_pipeline
from vivace.watch import replaced

Subject = TypeVar("Subject")

DENOISER_NAMES = ("transformer", "transformer_2", "unet", "prior", "decoder")
"""Where a pipeline of no known family keeps its denoiser."""


@dataclass(kw_only=True, eq=False)
class Acceleration:
    """What was done to one pipeline or denoiser."""

    target: Target
    seconds: float  # that `accelerate` took


def accelerate(subject: Subject, preset: str | Config | Mapping[str, Any] = "exact", /, **fields: Any) -> Subject:
    """Make a pipeline, or a bare denoiser, fast: in place, reversibly. Returns `subject`.

    `preset` is a preset's name or a Config; `fields` replace single fields of it. What was asked for is done or raises
    InputError before anything is changed; what was left to us is in `report(subject)`, with the reason. Called again
    with another configuration, or when a component was replaced, it takes the first one's place; else it does nothing.
    Fused blocks only go forward:
    with gradients enabled the stock forward runs. A deep copy of `subject` is a stock pipeline.
    """
    config = resolve(preset, **fields)
    before = acceleration_of(subject)
    if before is None:
        _apply(subject, config)
    elif before.target.subject is not subject:
        raise InputError(
            f"this {type(subject).__name__} is accelerated through a {type(before.target.subject).__name__}; "
            "call vivace.restore on that one first"
        )
    elif (exchanged := before.target.replaced()) or before.target.config != config:
        for name in {*exchanged} & {*before.target.denoisers}:
            _check_denoiser(name, getattr(subject, name), subject)
        bases = _undo(before.target, keeping=None if exchanged else config)
        try:
            _apply(subject, config, bases)
        except InputError:
            _apply(subject, before.target.config, bases)
            raise
    return subject


def restore(subject: Subject) -> Subject:
    """Undo `accelerate`: the stock behaviour, bit for bit, and nothing of ours left. Returns `subject`.

    Does nothing to a pipeline that is not accelerated. Raises InputError, and changes nothing, where quantised layers
    cannot go back to 16 bit.
    """
    acceleration = acceleration_of(subject)
    if acceleration is not None:
        _undo(acceleration.target)
    return subject


def acceleration_of(subject: Any) -> Acceleration | None:
    """What was done to a pipeline or denoiser, or None."""
    return getattr(type(subject), "vivace_acceleration", None)


def _undo(target: Target, *, keeping: Config | None = None) -> list[Base]:
    """Undo what was done; layers that `keeping` wants quantised in the same way stay so, and their bases are returned.

    Raises InputError, before anything is undone, where originals are gone.
    """
    wanted = None if keeping is None else (keeping.quant, keeping.keep_base)
    same = wanted == (target.config.quant, target.config.keep_base)
    for base in () if same else target.bases:
        base.check()
    with torch.inference_mode(target.inference):
        target.undo.close()
        for base in () if same else target.bases:
            base.put_back()
    return target.bases if same else []


def _apply(subject: Any, config: Config, bases: Sequence[Base] = ()) -> None:
    started = time.perf_counter()
    family = _family(subject)
    denoisers = _denoisers(subject, family)
    target = Target(
        subject=subject,
        family=family,
        config=config,
        denoisers=denoisers,
        pipeline=None if subject in denoisers.values() else type(subject),
        place=device_for(config),
        bases=list(bases),
        inference=any(map(in_inference, denoisers.values())),
    )
    for name, denoiser in target.denoisers.items():
        _check_denoiser(name, denoiser, subject)
    # What is made of weights is of their kind: in inference mode a weight of training would not come back as one.
    with torch.inference_mode(target.inference):
        acceleration = _passes(target, bases)
    acceleration.seconds = time.perf_counter() - started


def _passes(target: Target, bases: Sequence[Base]) -> Acceleration:
    """Check all passes, then apply those that are wanted, in order; every failure leaves nothing behind."""
    subject, config = target.subject, target.config
    with held_out(target.denoisers.values() if config.lora != "off" else (), target.bases):
        wanted = wanted_passes(target)
    acceleration = Acceleration(target=target, seconds=0.0)
    members = {"vivace_acceleration": acceleration}
    # Until `pop_all` every failure undoes what was done so far.
    with _put_back_on_failure(target, bases), target.undo as failing:
        for name, denoiser in target.denoisers.items():
            lane = target.lanes[name] = Lane(name, denoiser, named_blocks=names_blocks(config))
            lane.moved = lambda: _move(acceleration)
            lane.install(members=members, undo=failing)
        for one in wanted:
            one.apply(target)
        if subject not in target.denoisers.values():
            # Not `failing`: undos also come later, with a scheduler that is put in later.
            scope_pipeline(
                subject,
                members={**lora_methods(target), **members},
                undo=lambda step: target.undo.callback(step),
                opening=target.warn_of_replaced,
            )
        target.undo = failing.pop_all()
    order = [one.name for one in PASSES]
    target.notes.sort(key=lambda note: order.index(note.name))
    target.remember_parts()
    return acceleration


@contextmanager
def _put_back_on_failure(target: Target, before: Sequence[Base]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for base in target.bases[len(before) :]:
            base.put_back()
        raise


def wanted_passes(target: Target) -> list[Pass]:
    """The passes that will run; the reasons of the others are noted. Raises InputError for one that was asked for."""
    wanted = []
    for one in PASSES:
        wants = one.wants(target.config)
        reason = "switched off" if wants == "off" else one.check(target)
        if reason and wants == "on":
            raise InputError(f"{one.name}={plain(target.config)[one.name]!r} cannot be done here: {reason}")
        if reason:
            target.notes.append(Note(name=one.name, done=False, detail=reason))
        else:
            wanted.append(one)
    return wanted


def _move(acceleration: Acceleration) -> None:
    """The denoiser went to another kind of device, where other choices hold: make them again."""
    target = acceleration.target
    bases = _undo(target, keeping=target.config)
    _apply(target.subject, target.config, bases)


def _family(subject: Any) -> Family | None:
    """The family of a pipeline, else that of its denoiser, else None: the generic lane."""
    found = map(known_family, (subject, *_named_denoisers(subject).values()))
    return next((family for family in found if family is not None), None)


def _named_denoisers(subject: Any) -> dict[str, torch.nn.Module]:
    found = {name: getattr(subject, name, None) for name in DENOISER_NAMES}
    return {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}


def _denoisers(subject: Any, family: Family | None) -> dict[str, torch.nn.Module]:
    if isinstance(subject, torch.nn.Module) and not _named_denoisers(subject):
        return {"denoiser": subject}
    named = {name: getattr(subject, name, None) for name in family.denoisers} if family else {}
    found = {name: module for name, module in named.items() if isinstance(module, torch.nn.Module)}
    found = found or _named_denoisers(subject)
    if not found:
        raise InputError(
            f"found no denoiser in a {type(subject).__name__}: it has none of {', '.join(DENOISER_NAMES)}; "
            "load its components first, or pass the denoiser module itself"
        )
    return found


def _check_denoiser(name: str, denoiser: torch.nn.Module, subject: Any) -> None:
    """Raise InputError for a denoiser whose call cannot be taken over."""
    if isinstance(denoiser, torch._dynamo.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in denoiser.modules()
    ):
        raise InputError(
            f"the {name} is compiled already; accelerate it uncompiled (torch.compile returns a wrapper: "
            "put `._orig_mod` back) and ask for compile='on'"
        )
    if (through := acceleration_of(denoiser)) is not None and through.target.subject is not subject:
        raise InputError(
            f"the {name} is accelerated already, through another {type(through.target.subject).__name__}; it is as "
            "fast here, or call vivace.restore on that one first"
        )
    if getattr(denoiser, "hf_device_map", None):
        raise InputError(f"the {name} is spread over devices (device_map); load it without device_map")
    if hooks_of(denoiser):
        raise InputError(
            f"the {name} carries diffusers hooks (group offload, layerwise casting or a cache); accelerate it first "
            "and enable them afterwards"
        )
    if replaced(denoiser) and not hasattr(denoiser, "_hf_hook"):
        raise InputError(f"the {name}'s forward was replaced on the instance; `del {name}.forward` first")
