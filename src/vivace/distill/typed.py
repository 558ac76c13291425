"""Values held against the types that a frozen dataclass declares: from a file, or given in Python. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vivace.errors import InputError


def build(kind: Any, values: Any, *, where: str = "") -> Any:
    """An instance of the dataclass `kind` from a mapping; `where` names it in errors. Raises InputError."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where.rstrip('.')} holds {values!r}; it takes keys such as {_names(kind)[0]}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {where}{name}; the nearest is {where}{near} (known: {', '.join(hints)})")
    needed = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in values]
    if needed:
        raise InputError(f"{where}{needed[0]} is missing; every {kind.__name__} needs it")
    return kind(**{name: _value(hints[name], value, where=f"{where}{name}") for name, value in values.items()})


def checked(made: Any, *, where: str = "") -> Any:
    """A dataclass's instance whose fields all have the types it declares, at any depth: lists become tuples there, and
    mappings what they stand for. Raises InputError for any other value.
    """
    for name, kind in typing.get_type_hints(type(made)).items():
        # Frozen for everyone else: this is the end of its making.
        object.__setattr__(made, name, _value(kind, getattr(made, name), where=f"{where}{name}"))
    return made


def _value(kind: Any, value: Any, *, where: str) -> Any:
    """`value` as the annotation `kind`; what has the wrong type is refused, never bent."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return checked(value, where=f"{where}.") if type(value) is kind else build(kind, value, where=f"{where}.")
    if origin in (types.UnionType, typing.Union):
        options = [one for one in arguments if one is not type(None)]
        return None if value is None and type(None) in arguments else _value(options[0], value, where=where)
    if origin is Literal:
        # 1 is not true.
        if (type(value), value) not in [(type(one), one) for one in arguments]:
            raise InputError(f"{where} is {value!r}; it is one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, where=where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; it takes keys and values")
        return dict(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is not float and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    hint = " (in YAML a number like 1e-5 has to be written 1.0e-5)" if kind is float else ""
    raise InputError(f"{where} is {value!r}; it takes {_ARTICLE[kind]}{hint}")


_ARTICLE = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def _tuple(arguments: tuple[Any, ...], value: Any, *, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is {value!r}; it takes a list")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise InputError(f"{where} is {value!r}; it takes {len(arguments)} values")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_value(kind, one, where=f"{where}[{index}]") for index, (kind, one) in pairs)


def _required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _names(kind: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(kind)]
