"""The NaN guard: an attention output that is not finite stops the run, with layer, backend and step."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch

from vivace import request
from vivace.attention.backend import Attend, Backend
from vivace.attention.packed import Operands, Packed
from vivace.kernels.row import HeadScaled


class NotFiniteError(ArithmeticError):
    """An attention output holds NaN or infinity."""


def guarded(backend: Backend) -> Attend:
    """`backend.attend`, which raises NotFiniteError when its result is not finite. It never switches backends."""

    def attend(q, k, v, *, mask=None, scale=None):
        out = backend.attend(q, k, v, mask=mask, scale=scale)
        if not out.isfinite().all():
            _stop(backend, q)
        return out

    if not isinstance(packed := backend.attend, Packed):
        return attend

    def heads(operands: Operands, *, scale: float | None = None) -> HeadScaled:
        out = packed.heads(operands, scale=scale)
        if not (out.values.float().isfinite().all() and out.scales.isfinite().all()):
            _stop(backend, operands.q)
        return out

    return replace(packed, attend=attend, heads=heads)


def _stop(backend: Backend, q: torch.Tensor) -> NoReturn:
    now = request.current()
    where = request.LAYER.get() or "an attention layer"
    when = f"step {now.step}" if now else "a call outside a pipeline"
    raise NotFiniteError(
        f"attention is not finite in {where}, backend {backend.name}, {when}; "
        f"q, k, v are {tuple(q.shape)} {q.dtype}: use attention='native' or a wider dtype"
    )
