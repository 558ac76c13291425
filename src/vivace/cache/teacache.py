"""TeaCache (arXiv 2411.19108): the modulated input of the first block foretells how much the output changes.

A polynomial, fitted for each model, maps the relative change of that signal from step to step to the change of the
output. The mapped changes add up; while they are below `threshold`, the blocks add what they added last time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

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
    """The polynomial, highest power first; None: as published for the model, or as calibrated."""

    def refuses(self, target: Target) -> str | None:
        family = target.family
        if family is None or family.signal is None:
            return "TeaCache has no signal for this model; use firstblock, which needs none"
        if self.coefficients is None and len(_published(target)) != 1:
            return _choice(target)
        return None

    def bind(self, target: Target) -> TeaCache:
        if self.coefficients is not None:
            return self
        (coefficients,) = set(_published(target).values())
        return replace(self, coefficients=coefficients)

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        from vivace.cache.change import relative_change

        assert self.coefficients is not None
        signal, front = call.signal(), call.front(0)
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
    """The polynomial with these coefficients, highest power first, at `x`."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _published(target: Target) -> Mapping[str, tuple[float, ...]]:
    """Variant -> its polynomial, for the variants that this denoiser's configuration fits."""
    assert target.family is not None
    config = next(iter(target.denoisers.values())).config
    fitting = {name: v for name, v in target.family.variants.items() if v.teacache and _fits(v, config)}
    # Variants that spell out more of the configuration know it better.
    most = max((len(v.denoiser) for v in fitting.values()), default=0)
    return {name: v.teacache for name, v in fitting.items() if v.teacache and len(v.denoiser) == most}


def _fits(variant: Variant, config: Any) -> bool:
    return all(_plain(config.get(name)) == _plain(value) for name, value in variant.denoiser.items())


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
