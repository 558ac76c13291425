"""`Parts`: what every fused block of a denoiser is built with."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from vivace.attention.backend import Attend
from vivace.fused.elementwise import Elementwise


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How its attention and the arithmetic between its products are computed, and where what undoes it goes."""

    attend: Attend
    elementwise: Elementwise
    undo: ExitStack
