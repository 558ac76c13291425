"""`Packed`: attention whose heads are in e4m3 before it and after it, for blocks that can write and read them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vivace.attention.backend import Attend
from vivace.kernels.row import HeadScaled


class Operands(NamedTuple):
    """q, k and v in e4m3."""

    q: torch.Tensor  # [B, Sq, H, D]
    k: torch.Tensor  # [B, Sk, H, D]
    v: HeadScaled
    descale: torch.Tensor | None = None  # [1, 1, 1, 1] float32: q's scale times k's; None: 1


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An `Attend` that stores its heads in e4m3: called, it takes and makes 16 bit like any other.

    Who normalises q and k himself writes `Operands` himself, and who reads rows in 8 bits reads its heads as they are.
    """

    attend: Attend
    serves: Callable[..., bool]  # (*, keys, depth, mask) -> whether such a call is one for e4m3 now
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Operands]  # from 16 bit
    heads: Callable[..., HeadScaled]  # (operands, *, scale=None): attention's output
    scales_only: bool = True  # q and k need no more than a scale: whoever makes them can make them in e4m3

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """As `Attend`."""
        return self.attend(q, k, v, mask=mask, scale=scale)
