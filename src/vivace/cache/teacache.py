"""TeaCache (arXiv 2411.19108): the modulated input of the first block foretells how much the output changes.

A polynomial, fitted for each model, maps the relative change of that signal from step to step to the change of the
output. The mapped changes add up; while they are below `threshold`, the blocks add what they added last time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.calibration import calibration_of
from vivace.cache.policy import Holds
from vivace.cache.window import Windowed

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.family import Variant
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """The signal of the last step, the change since the last computed one, and what the blocks added then."""

    signal: torch.Tensor | None = None
    change: float = 0.0
    rest: torch.Tensor | None = None
    skips: int = 0


@dataclass(frozen=True, kw_only=True)
class TeaCache(Windowed):
    """Skip the blocks until the expected change of the output has added up to `threshold`."""

    name: ClassVar[str] = "teacache"
    blocks: ClassVar[bool] = True
    stacked: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(hiddens=2)

    threshold: float = 0.25
    """Sum of expected relative changes of the output, from which a step is computed."""

    coefficients: tuple[float, ...] | None = None
    """The polynomial, highest power first; None: as calibrated, or as published for the model."""

    file: str | None = None
    """A calibration, from `vivace calibrate`; None: the one that ships with the model, if any."""

    def refuses(self, target: Target) -> str | None:
        family = target.family
        if family is None or family.signal is None:
            return "TeaCache has no signal for this model; use firstblock, which needs none"
        return None if len(self._known(target)) == 1 else _choice(target)

    def bind(self, target: Target) -> TeaCache:
        (coefficients,) = self._known(target)
        return replace(self, coefficients=coefficients)

    def _known(self, target: Target) -> set[tuple[float, ...]]:
        """The polynomials that may be meant."""
        if self.coefficients is not None:
            return {self.coefficients}
        calibration = calibration_of(target, file=self.file)
        if calibration is not None and calibration.teacache is not None:
            return {calibration.teacache}
        return set() if self.file else set(_published(target).values())

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        from vivace.cache.change import relative_change

        assert self.coefficients is not None
        front = call.front(0, signal=True)
        signal = front.signal
        assert signal is not None
        if memory.signal is not None:
            memory.change += polynomial(self.coefficients, relative_change(signal, memory.signal))
        # Also on skipped steps: the polynomial was fitted to changes from one step to the next.
        memory.signal = signal
        if memory.rest is None or self.forced(call, skips=memory.skips) or memory.change >= self.threshold:
            out, memory.rest = call.rest(front)
            memory.change, memory.skips = 0.0, 0
            return out
        call.skipped = True
        memory.skips += 1
        front.state.x = front.state.x + memory.rest
        return call.end(front.state)


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """The polynomial with these coefficients, highest power first, at `x`; infinite where `x` is."""
    # The signs of some would say that nothing changed.
    if x == inf:
        return inf
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _published(target: Target) -> Mapping[str, tuple[float, ...]]:
    """Variant -> its polynomial, for the variants of exactly this denoiser's configuration."""
    assert target.family is not None
    denoiser = next(iter(target.denoisers.values()))
    variants = {name: variant for name, variant in target.family.variants.items() if _fits(variant, denoiser)}
    return {name: variant.teacache for name, variant in variants.items() if variant.teacache}


def _fits(variant: Variant, denoiser: Any) -> bool:
    """Whether the variant, with its class's defaults where it says nothing, has the denoiser's configuration."""
    parameters = inspect.signature(type(denoiser).__init__).parameters
    known = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | dict(variant.denoiser)
    return all(_plain(denoiser.config.get(name)) == _plain(value) for name, value in known.items())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _choice(target: Target) -> str:
    known = _published(target)
    if known:
        return f"several polynomials fit this model; pass coefficients= of one of {', '.join(known)}"
    return (
        "no TeaCache polynomial is known for this model; fit one with vivace calibrate, pass coefficients=, "
        "or use firstblock, which needs none"
    )
