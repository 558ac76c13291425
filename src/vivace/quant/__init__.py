"""Linears in eight bits, and four: the formats, by name. Each value is `module:attribute`, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vivace.quant.format import Format

FORMATS: dict[str, str] = {
    "fp8": "vivace.quant.fp8:FP8",
    "int8": "vivace.quant.int8:INT8",
    "fp8_weights": "vivace.quant.storage:FP8_WEIGHTS",
    "int8_weights": "vivace.quant.storage:INT8_WEIGHTS",
    "int4_weights": "vivace.quant.storage:INT4_WEIGHTS",
}


def format_of(name: str) -> Format:
    """The format of that name; KeyError where there is none."""
    module, attribute = FORMATS[name].split(":")
    return getattr(import_module(module), attribute)
