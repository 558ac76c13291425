"""Vivace: diffusion pipelines, fast. Importing this loads no torch and touches no GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.errors import InputError
    from vivace.family import Family, family_of

__version__ = "0.1.0"

# PEP 562: a name's module is imported when the name is first asked for.
_HOME = {
    "Family": "vivace.family",
    "InputError": "vivace.errors",
    "family_of": "vivace.family",
}

__all__ = ["Family", "InputError", "family_of"]  # the type checker reads this one; a test holds it equal to _HOME


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vivace' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
