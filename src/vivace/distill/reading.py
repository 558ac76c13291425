"""A `DistillConfig` out of YAML or plain values; what has the wrong name or type is refused. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vivace.distill.config import DistillConfig
from vivace.distill.typed import build
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
    return build(DistillConfig, values)
