"""How what computes asks for weights that may have to come first; `stream.py` is who brings them.

A module of which some blocks are streamed has a class that answers, and so has each of those blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Bring = Callable[[Iterable[Any]], AbstractContextManager[Any]]
"""`bring(modules)`: within the block these modules, or parts of them, compute one after another."""

_HERE = nullcontext()


def here(block: torch.nn.Module) -> AbstractContextManager[Any]:
    """Within the block the weights of `block` are where it computes."""
    found = getattr(type(block), "vivace_here", None)
    return _HERE if found is None else found()


def comes(block: torch.nn.Module) -> bool:
    """Whether the weights of `block` are there for its own step alone."""
    return hasattr(type(block), "vivace_here")


def nothing(modules: Iterable[Any]) -> AbstractContextManager[Any]:
    """All weights are there."""
    return _HERE


def bring_of(module: torch.nn.Module) -> Bring:
    """What brings the weights of a module's blocks for a part of its call."""
    return getattr(type(module), "vivace_bring", None) or nothing
