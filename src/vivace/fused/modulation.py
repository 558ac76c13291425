"""Shift, scale and gate of every adaptive norm of a model, in one GEMM a step, or as far as a cache lets blocks run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from vivace.family import State
from vivace.fused.stack import Stack


class Modulation:
    """The modulation linears of `groups` side by side: first the group that the epilogue reads, then each block's.

    `spans[name]` is where that norm's chunks of `width` (None: as many as inputs) lie in the result, in the order in
    which its linear makes them. With `times` of several embeddings a chunk comes once for each, in a row, and `spans`
    are of the first.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, torch.nn.Linear]],
        *,
        undo: ExitStack,
        width: int | None = None,
        times: int = 1,
    ) -> None:
        linears: list[torch.nn.Linear] = []
        self.spans: dict[str, slice] = {}
        self.times, self.chunks = times, 0
        self._ends = [(0, 0)]  # chunks and linears of no group, of the first one, of the first two, ...
        for group in groups:
            for name, linear in group.items():
                start, self.chunks = self.chunks, self.chunks + linear.out_features // (width or linear.in_features)
                self.spans[name] = slice(start * times, self.chunks * times, times)
                linears.append(linear)
            self._ends.append((self.chunks, len(linears)))
        self.stack = Stack(linears, undo=undo)
        self.columns = sum(linear.out_features for linear in linears)
        self._parts: dict[tuple[int, int], Stack] = {}

    def __call__(self, embedding: torch.Tensor) -> torch.Tensor:
        """All chunks [B, chunks, width], from the activated embedding [B, D] of time, guidance and pooled text."""
        return self.stack(embedding).unflatten(-1, (self.chunks, -1))

    def ready(self, state: State, first: int, last: int | None) -> State:
        """See `Split.ready`: the context's "modulation" as far as block `last`, from its "embedding".

        That is [B, D], or [B, times, D]. One GEMM makes what is not there yet; what blocks before `first` would have
        read stays None.
        """
        made = state.context["modulation"]
        here = bisect_left(self._ends, (len(made) // self.times,))
        start = max(here, first + 1) if made else 0
        end = len(self._ends) - 1 if last is None else last + 1
        if end <= start:
            return state
        (before, _), (after, _) = self._ends[start], self._ends[end]
        rows = self._rows(start, end, state.context).unflatten(-1, (after - before, -1))
        gap = (None,) * (before * self.times - len(made))
        return replace(state, context={**state.context, "modulation": (*made, *gap, *_vectors(rows))})

    def table(self, embedding: torch.Tensor) -> torch.Tensor:
        """All columns for many embeddings [..., D]: [..., W], group by group, so that none is unpacked with another."""
        groups = range(len(self._ends) - 1)
        return torch.cat([self._part(group, group + 1)(embedding) for group in groups], -1)

    def _rows(self, start: int, end: int, context: Mapping[str, Any]) -> torch.Tensor:
        """The columns of some groups: those of the context's "made", where it has them."""
        part, embedding, made = self._part(start, end), context["embedding"], context.get("made")
        if made is None:
            return part(embedding)
        first, last = (sum(one.out_features for one in self.stack.linears[: self._ends[at][1]]) for at in (start, end))
        return part.unless(made.found.repeat_interleave(self.times), embedding, made.rows.flatten(0, 1)[:, first:last])

    def _part(self, start: int, end: int) -> Stack:
        """The linears of some groups."""
        if (start, end) not in self._parts:
            linears = slice(self._ends[start][1], self._ends[end][1])
            self._parts[start, end] = self.stack.part(linears)
        return self._parts[start, end]


def modulating(groups: Iterable[Mapping[str, torch.nn.Linear]]) -> list[torch.nn.Linear]:
    """The linears of all groups."""
    return [linear for group in groups for linear in group.values()]


def reaches(modulation: Sequence[Any], span: slice) -> bool:
    """Whether `modulation` was made as far as `span`."""
    return span.start < len(modulation)


def _vectors(rows: torch.Tensor) -> Iterable[torch.Tensor]:
    """[B, chunks, width] or [B, times, chunks, width] -> each [B, width], a chunk's times in a row."""
    if rows.ndim == 3:
        return rows.unbind(1)
    return chain.from_iterable(zip(*(one.unbind(1) for one in rows.unbind(1)), strict=True))
