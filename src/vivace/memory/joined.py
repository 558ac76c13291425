"""Tensors side by side in one piece of memory, so that they can be read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch

_PLANNED: ContextVar[list[list[torch.Tensor]] | None] = ContextVar("planned", default=None)
"""Within `planning`: what would be joined so far."""
_FIXED: ContextVar[bool] = ContextVar("fixed", default=False)


def join(tensors: Sequence[torch.Tensor], undo: ExitStack) -> torch.Tensor:
    """One tensor of all `tensors` along their first dimension, of which they become views until the undo.

    Those that lie side by side already stay where they are.
    """
    planned = _PLANNED.get()
    if planned is not None:
        planned.append(list(tensors))
        return tensors[0].data
    if (there := _neighbours(tensors)) is not None:
        return there
    counts = [len(tensor) for tensor in tensors]
    joined = tensors[0].new_empty(sum(counts), *tensors[0].shape[1:])
    for tensor, rows in zip(tensors, joined.split(counts), strict=True):
        share(tensor, rows, undo)
    return joined


def share(tensor: torch.Tensor, memory: torch.Tensor, undo: ExitStack) -> None:
    """Let a tensor lie in `memory`, with the values that it has, until the undo."""
    memory.copy_(tensor.data)
    tensor.data = memory
    undo.callback(_part, tensor, memory)


def followed(joined: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """What was joined, where its `first` tensor now is: streaming brings all of them elsewhere."""
    if first.data_ptr() == joined.data_ptr():
        return joined
    return first.data.as_strided(joined.shape, joined.stride())


@contextmanager
def fixed() -> Iterator[None]:
    """Within the block weights stay where they lie: they travel, side by side as they are."""
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


def movable() -> bool:
    """Whether what is built may give weights other memory."""
    return not _FIXED.get()


@contextmanager
def planning() -> Iterator[list[list[torch.Tensor]]]:
    """Within the block nothing is joined: what would be is listed. What is built there computes nothing right."""
    token = _PLANNED.set([])
    try:
        found = _PLANNED.get()
        assert found is not None
        with fixed():
            yield found
    finally:
        _PLANNED.reset(token)


def _neighbours(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """All of `tensors` as one, where each begins at the end of the one before it in the same memory."""
    first = tensors[0]
    for one, following in pairwise(tensors):
        if one.dtype != following.dtype or one.shape[1:] != following.shape[1:]:
            return None
        if one.is_meta or one.untyped_storage().data_ptr() != following.untyped_storage().data_ptr():
            return None
        if one.data_ptr() + one.nbytes != following.data_ptr():
            return None
    if len(tensors) < 2 or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return first.data.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _part(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    # One that was moved, cast or loaded in the meantime has its own storage already.
    if tensor.data_ptr() == memory.data_ptr():
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
