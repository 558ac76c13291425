"""`Policy`: which steps or blocks of a request are computed and which reused. Loads no torch."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.cache.call import Call, Schedule
    from vivace.passes.target import Target


NUMBERS = (tuple[float, ...], tuple[float, ...] | None)
"""Kinds of fields that take several numbers."""


@dataclass(frozen=True, kw_only=True)
class Holds:
    """How many tensors a policy keeps at most for one call of the denoiser, for the forecast of its memory."""

    outputs: int = 0  # of the denoiser's output, in fp32
    hiddens: int = 0  # of the picture's stream between the blocks
    streams: int = 0  # of that and the text's together
    attentions: int = 0  # of both streams, for every attention module

    def nbytes(self, *, output: int, hidden: int, text: int = 0, modules: int = 0) -> int:
        """The most that is kept, from the bytes of an output in fp32 and of the two streams; `modules` of attention."""
        both = hidden + text
        return self.outputs * output + self.hiddens * hidden + (self.streams + self.attentions * modules) * both


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A row of settings, and what it does with one denoiser call.

    It is a value without state: `fresh` makes what is remembered of one guidance branch of one request, and `serve`
    answers a call with it. `refuses` says why it cannot run on a pipeline; `bind` fills in what the model knows.
    """

    name: ClassVar[str]
    least: ClassVar[Mapping[str, float]] = {}
    """Field -> its smallest value; else 0."""
    most: ClassVar[Mapping[str, float]] = {}
    """Field -> its largest value; else there is none."""
    blocks: ClassVar[bool] = False
    """Whether it works between the denoiser's blocks, so that it needs the family's Split."""
    probes: ClassVar[bool] = False
    """Whether it computes blocks at every step to decide with."""
    stacked: ClassVar[bool] = False
    """Whether the stream must keep its shape from block to block, which a UNet's does not."""
    modules: ClassVar[bool] = False
    """Whether it works on attention modules, which fused blocks do not call."""
    holds: ClassVar[Holds] = Holds()

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            self._check(field.name, kinds[field.name], getattr(self, field.name))

    def _check(self, name: str, kind: Any, value: Any) -> None:
        allowed = typing.get_args(kind) or (kind,)
        if value is None and type(None) in allowed:
            return
        if kind in NUMBERS:
            # An empty polynomial would be 0 everywhere; what has no None says by it that nothing was given.
            right = isinstance(value, tuple) and all(map(_is_number, value)) and (value or type(None) not in allowed)
            what, example = "numbers", "1.0+0.5"
        elif float in allowed or kind in (int, int | None):
            least, most = self.least.get(name, 0), self.most.get(name, math.inf)
            right = _is_number(value, whole=float not in allowed) and least <= value <= most
            reach = f"from {least} on" if most == math.inf else f"from {least} to {most}"
            what, example = f"{'a number' if float in allowed else 'a whole number'} {reach}", least
        else:
            right, what, example = str not in allowed or isinstance(value, str), "text", "..."
        if not right:
            raise InputError(f"{self.name}: {name} is {what}, got {value!r}; for example {name}={example}")

    def refuses(self, target: Target) -> str | None:
        """Why this policy cannot run on `target`, or None."""
        return None

    def bind(self, target: Target) -> Policy:
        """The policy with everything filled in that is known about `target`."""
        return self

    def leaves_none(self, target: Target, field: str) -> str | None:
        """Why so many blocks as `field` says cannot be taken from the front of the stream; None where some are left."""
        blocks, given = sum(1 for _ in target.repeated_blocks()) // len(target.denoisers), getattr(self, field)
        if given < blocks:
            return None
        return f"{self.name}: {field}={given} leaves none of the {blocks} blocks to skip; give at most {blocks - 1}"

    def fresh(self) -> Any:
        """What is remembered of one branch of one request, at its first step."""
        raise TypeError(f"{type(self).__name__} keeps nothing")

    def computes(self, step: int, schedule: Schedule) -> bool | None:
        """Whether `step` of a request is computed where that is known before the run; None where it is seen then.

        The first call of a branch is computed in any case.
        """
        return None

    def serve(self, memory: Any, call: Call) -> Any:
        """What the denoiser returns for `call`, computed or estimated."""
        raise TypeError(f"{type(self).__name__} serves nothing")


def _is_number(value: Any, *, whole: bool = False) -> TypeGuard[float]:
    if isinstance(value, float):
        return not whole and not math.isnan(value)
    return isinstance(value, int) and not isinstance(value, bool)


def spell(policy: Policy) -> str:
    """`teacache:threshold=0.25`: the policy as the command line takes it, without what is at its default."""
    fields = [(f.name, f.default, getattr(policy, f.name)) for f in dataclasses.fields(policy)]
    said = [f"{name}={_word(value)}" for name, default, value in fields if value != default]
    return ":".join((policy.name, ",".join(said))) if said else policy.name


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
