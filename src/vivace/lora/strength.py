"""The strength of LoRA layers that a denoiser's call brings in its attention kwargs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTENTION_KWARGS = ("joint_attention_kwargs", "cross_attention_kwargs", "attention_kwargs")
"""The arguments of denoisers in which it travels."""


def strength_in(kwargs: Mapping[str, Any]) -> Any:
    """The strength, 1 where the call brings none."""
    return next((value["scale"] for value in _brought(kwargs).values()), 1.0)


def without_strength(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments but for it: where it has been settled, no other recording is made for each."""
    rest = {
        name: {key: one for key, one in value.items() if key != "scale"} for name, value in _brought(kwargs).items()
    }
    return {**kwargs, **rest}


def _brought(kwargs: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: value for name in ATTENTION_KWARGS if (value := kwargs.get(name)) and "scale" in value}
