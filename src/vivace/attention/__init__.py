"""Attention backends, by name. Each value is `module:attribute`, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vivace.attention.backend import Backend

BACKENDS: dict[str, str] = {
    "native": "vivace.attention.native:NATIVE",
    "cudnn": "vivace.attention.native:CUDNN",
    "cudnn_fp8": "vivace.attention.cudnn_fp8:CUDNN_FP8",
    "cudnn_fp8_rotated": "vivace.attention.cudnn_fp8:CUDNN_FP8_ROTATED",
    "efficient": "vivace.attention.native:EFFICIENT",
    "few_keys": "vivace.attention.few_keys:FEW_KEYS",
    "flash": "vivace.attention.flash:FLASH",
    "radial": "vivace.attention.radial:RADIAL",
    "sage": "vivace.attention.sage:SAGE",
    "xformers": "vivace.attention.xformers:XFORMERS",
}


def backend_of(name: str) -> Backend:
    """The backend of that name; KeyError where there is none."""
    module, attribute = BACKENDS[name].split(":")
    return getattr(import_module(module), attribute)
