"""`Fused`: what a file of hand-fused blocks provides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch

from vivace.attention.backend import Attend
from vivace.family import Split


class Fuse(Protocol):
    """Build the fused Split of a denoiser as it is now, with `attend` for its attention.

    Weights that are rearranged stay the denoiser's own parameters (views of the new layout); what puts them back goes
    on `undo`. Called again, after the undo, whenever weights were moved, cast, loaded or adapted.
    """

    def __call__(self, denoiser: torch.nn.Module, *, attend: Attend, undo: ExitStack) -> Split: ...


@dataclass(frozen=True, kw_only=True)
class Fused:
    """The hand-fused blocks of one family."""

    summary: str  # what is fused, for the report
    devices: frozenset[str]  # device types on which they beat the stock blocks
    check: Callable[[torch.nn.Module], str | None]  # why this denoiser cannot be fused
    declines: Callable[..., str | None]  # declines(**forward_kwargs): why one call must take the stock path
    fuse: Fuse
    quantised: bool = False  # calls its linears where they are quantised, and never reads their weights
    sides: bool = False  # every product is a module's call or a Stack's, which add the adapters beside their linears
