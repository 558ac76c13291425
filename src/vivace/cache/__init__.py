"""Step caches: the policies by the name the command line uses, and how they are read and written. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable
from typing import Any

from vivace.cache.blockdance import BlockDance
from vivace.cache.deepcache import DeepCache
from vivace.cache.dicache import DiCache
from vivace.cache.first_block import FirstBlock
from vivace.cache.guidance import GuidanceReuse
from vivace.cache.magcache import MagCache
from vivace.cache.meancache import MeanCache
from vivace.cache.pab import PAB
from vivace.cache.planned import Planned
from vivace.cache.policy import Policy, spell
from vivace.cache.steps import Steps
from vivace.cache.taylorseer import TaylorSeer
from vivace.cache.teacache import TeaCache
from vivace.errors import InputError

POLICIES: dict[str, type[Policy]] = {
    "planned": Planned,
    "steps": Steps,
    "firstblock": FirstBlock,
    "teacache": TeaCache,
    "dicache": DiCache,
    "magcache": MagCache,
    "taylorseer": TaylorSeer,
    "meancache": MeanCache,
    "blockdance": BlockDance,
    "deepcache": DeepCache,
    "pab": PAB,
    "guidance": GuidanceReuse,
}

__all__ = [
    "PAB", "POLICIES", "BlockDance", "DeepCache", "DiCache", "FirstBlock", "GuidanceReuse", "MagCache", "MeanCache",
    "Planned", "Policy", "Steps", "TaylorSeer", "TeaCache", "parse", "spell",
]  # fmt: skip


def parse(text: str) -> Policy | None:
    """`teacache:threshold=0.25` -> the policy; `none` -> None; a .yaml file -> what its cache section says.

    Raises InputError for an unknown policy or field, with the nearest name.
    """
    if text.lower() in ("none", "off"):
        return None
    if text.endswith((".yaml", ".yml")):
        from vivace.cache.cache_dit import read

        return read(text)
    name, _, rest = text.partition(":")
    kind = POLICIES.get(re.sub("[-_ ]", "", name.lower()))
    if kind is None:
        raise InputError(f"unknown cache policy {name!r}; {_nearest(name, POLICIES)}")
    # A comma separates fields only where a name follows: lists have commas too.
    fields = [_field(kind, part) for part in re.split(r",(?=\s*\w+=)", rest) if part]
    names = [name for name, _ in fields]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{kind.name}: {min(twice)} is given twice; give it once")
    return kind(**dict(fields))


def _field(kind: type[Policy], text: str) -> tuple[str, Any]:
    name, equals, value = text.strip().partition("=")
    # A field that is not shown is filled in from a file.
    kinds = {f.name: typing.get_type_hints(kind)[f.name] for f in dataclasses.fields(kind) if f.repr}
    if not equals:
        raise InputError(f"{kind.name} takes name=value, got {text!r}; for example {kind.name}:{next(iter(kinds))}=...")
    if name not in kinds:
        raise InputError(f"{kind.name} has no field {name!r}; {_nearest(name, kinds)}")
    return name, _value(kinds[name], value, f"{kind.name}: {name}")


def _value(kind: Any, text: str, what: str) -> Any:
    """`text` as the first type of `kind` that it reads as."""
    kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and text.lower() == "none":
        return None
    try:
        if any(typing.get_origin(k) is tuple for k in kinds) or typing.get_origin(kind) is tuple:
            return tuple(map(float, text.replace(",", "+").split("+")))
        if str in kinds:
            return text
        return int(text) if int in kinds else float(text)
    except ValueError:
        raise InputError(f"{what} is a number, got {text!r}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    return f"the nearest is {near!r} (known: {', '.join(known)})"
