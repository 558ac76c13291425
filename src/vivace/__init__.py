"""Vivace: diffusion pipelines, fast. Importing this loads no torch and touches no GPU."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.accelerate import accelerate, restore
    from vivace.config import PRESETS, Config
    from vivace.errors import InputError
    from vivace.family import Family, family_of
    from vivace.load import load
    from vivace.plan import plan
    from vivace.report import report

__version__ = "0.1.0"

# PEP 562: a name's module is imported when the name is first asked for.
_HOME = {
    "Config": "vivace.config",
    "Family": "vivace.family",
    "InputError": "vivace.errors",
    "PRESETS": "vivace.config",
    "accelerate": "vivace.accelerate",
    "family_of": "vivace.family",
    "load": "vivace.load",
    "plan": "vivace.plan",
    "report": "vivace.report",
    "restore": "vivace.accelerate",
}

# Packages of their own that are reached without importing them by name.
_ROOMS = ("serve",)

# Spelled out for type checkers; a test holds it equal to _HOME.
__all__ = ["PRESETS", "Config", "Family", "InputError", "accelerate", "family_of", "load", "plan", "report", "restore"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"vivace.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vivace' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps `vivace.load` the function: importing the module vivace/load.py would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
