"""Weights that leave the device for ordinary host memory, in less time than one plain copy after the other."""

from __future__ import annotations

from typing import Any

import torch

from vivace.memory.pinned import hold

PART = 32 << 20
"""Bytes of a buffer: enough for every core to have a share of it."""


class Leaving:
    """Copies tensors to the host through two page-locked buffers.

    The device fills one while all cores empty the other: fresh host memory is given page by page, which takes one core
    several times as long as the transfer. The buffers go with this object.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in ordinary, contiguous host memory. Raises InputError where the host has no room."""
        cuda = tensor.device.type == "cuda"
        self._buffers = self._buffers or [hold(PART, pin=cuda) for _ in range(2)]
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        parts = zip(_flat(tensor.contiguous()).split(PART), _flat(copy).split(PART), strict=True)
        filled = None
        for number, (source, target) in enumerate(parts):
            buffer = self._buffers[number % 2][: len(source)]
            buffer.copy_(source, non_blocking=True)
            arrived = torch.cuda.current_stream(tensor.device).record_event() if cuda else None
            _empty(filled)
            filled = (arrived, buffer, target)
        _empty(filled)
        return copy


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _empty(filled: tuple[Any, torch.Tensor, torch.Tensor] | None) -> None:
    """Move what arrived in a buffer to where it stays."""
    if filled is not None:
        arrived, buffer, target = filled
        if arrived is not None:
            arrived.synchronize()
        target.copy_(buffer)
