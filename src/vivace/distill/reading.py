"""A `DistillConfig` out of YAML or plain values; what has the wrong name or type is refused. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vivace.distill.config import DistillConfig
from vivace.errors import InputError

RECIPES = Path(__file__).parent / "recipes"


def read_config(name: str | Path, *, assignments: Sequence[str] = (), **fields: Any) -> DistillConfig:
    """The config in a YAML file, or a ready one by name (`builtin`, `sdxl`, ...); `fields` replace its fields.

    `assignments` are `KEY=VALUE`, as the command line takes them: `student.rank=16`, `stages[1].matching=0`.

    Raises InputError for what is not such a file, for unknown keys with the nearest name, and for wrong values.
    """
    import yaml

    path = Path(name).expanduser()
    ready = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.yaml"))}
    if not path.is_file():
        if str(name) not in ready:
            raise InputError(f"no config {name}; give a YAML file, or one of {', '.join(ready)}")
        path = ready[str(name)]
    try:
        # Safe: YAML's own tags can name Python objects.
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML that can be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no keys; start it with `teacher: ...`")
    for assignment in assignments:
        _assign(values, assignment)
    return from_dict({**values, **fields})


def _assign(values: Any, assignment: str) -> None:
    """Set one key of nested plain values."""
    import yaml

    key, equals, text = assignment.partition("=")
    *path, last = [
        int(part) if part.isdecimal() else part for part in key.replace("[", ".").replace("]", "").split(".")
    ]
    if not equals or not key:
        raise InputError(f"--set takes KEY=VALUE, got {assignment!r}; for example --set student.rank=16")
    try:
        for part in path:
            values = values.setdefault(part, {}) if isinstance(values, dict) else values[part]
        values[last] = yaml.safe_load(text)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"--set {key} names nothing that the config has; for example --set stages[0].steps=16"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment!r} is not a value that YAML can read") from error


def from_dict(values: Mapping[str, Any]) -> DistillConfig:
    """The config that plain values stand for. Raises InputError."""
    return _build(DistillConfig, values, where="")


def _build(kind: Any, values: Any, *, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping."""
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


def _value(kind: Any, value: Any, *, where: str) -> Any:
    """`value` as the annotation `kind`; what has the wrong type is refused, never bent."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if type(value) is kind else _build(kind, value, where=f"{where}.")
    if origin in (types.UnionType, typing.Union):
        options = [one for one in arguments if one is not type(None)]
        return None if value is None and type(None) in arguments else _value(options[0], value, where=where)
    if origin is Literal:
        if value not in arguments:
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
