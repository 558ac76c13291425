"""How many captions were drawn right: with an interval, by group, and of two systems on the same captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeVar

from vivace.errors import InputError
from vivace.evals.interval import Interval, newcombe, wilson

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """So many captions right of so many, e.g. as the built-in model's reader judges them."""

    right: int
    total: int

    @classmethod
    def of(cls, verdicts: Sequence[bool]) -> Accuracy:
        """The accuracy of one verdict a caption. Raises InputError when there is none."""
        if not len(verdicts):
            raise InputError("accuracy needs at least one verdict; the list of captions is empty")
        return cls(right=sum(map(bool, verdicts)), total=len(verdicts))

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the share."""
        return wilson(self.right, self.total)


def accuracy_by(groups: Sequence[Group], verdicts: Sequence[bool]) -> dict[Group, Accuracy]:
    """The accuracy of every group, in the groups' order of size or name.

    `groups` has one entry a caption: its number of objects, or whether its combination was held out.
    Raises InputError where the two lengths differ.
    """
    _same_length(groups, verdicts)
    members: dict[Group, list[bool]] = defaultdict(list)
    for group, verdict in zip(groups, verdicts, strict=True):
        members[group].append(verdict)
    return {group: Accuracy.of(members[group]) for group in sorted(members)}  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems judged on the same captions: on how many each was right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """The first system's share minus the second's."""
        return (self.only_first - self.only_second) / self.total

    @property
    def interval(self) -> Interval:
        """Newcombe's 95 % interval of the paired difference."""
        return newcombe(self.both, self.only_first, self.only_second, self.neither)

    @property
    def p_value(self) -> float:
        """The exact two-sided McNemar test: were the systems equally good, how often would they differ this much?

        Captions on which only one is right then fall to either as a coin does (McNemar, Psychometrika 12, 1947).
        """
        discordant = self.only_first + self.only_second
        tail = sum(comb(discordant, k) for k in range(min(self.only_first, self.only_second) + 1))
        return min(1.0, 2 * tail / 2**discordant)


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Two systems' verdicts, caption by caption in one order. Raises InputError where they are none or not as many."""
    _same_length(first, second)
    if not len(first):
        raise InputError("a comparison needs at least one caption; both lists are empty")
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    return Comparison(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def _same_length(first: Sequence[object], second: Sequence[object]) -> None:
    if len(first) != len(second):
        raise InputError(f"there must be one entry a caption on both sides, got {len(first)} and {len(second)}")
