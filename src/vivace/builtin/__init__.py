"""The built-in model: a small text-to-image model that ships with the package, in stock diffusers layout."""

from __future__ import annotations

from pathlib import Path

from vivace.errors import InputError


def folder() -> Path:
    """The built-in model's folder. Raises InputError where the installation lacks its weights."""
    path = Path(__file__).parent / "model"
    if not (path / "model_index.json").is_file():
        raise InputError("this installation lacks the built-in model's weights; reinstall vivace, or give --model PATH")
    return path
