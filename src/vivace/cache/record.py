"""What calibration needs to know of exact runs: outputs, changes from step to step, and the final latent."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_leaves

from vivace.cache.call import Call
from vivace.cache.change import relative_change
from vivace.cache.policy import Policy

UNIT = 1e4
"""An output so large that the noise which some schedulers add is nothing beside it."""

BACK = 8
"""Steps back to which the first block's contribution is compared."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One call of the denoiser beside the calls before it."""

    branch: str | None
    step: int
    signal: float | None  # TeaCache's signal, relative to the step before; None where the model has none
    output: float | None  # the output, relative to the step before
    added: tuple[float, ...]  # the first block's contribution, relative to 1, 2, ... steps before


@dataclass(eq=False)
class Memory:
    signal: torch.Tensor | None = None
    output: torch.Tensor | None = None
    added: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=BACK))


@dataclass(frozen=True, kw_only=True)
class Record(Policy):
    """Computes everything and writes down the changes."""

    name: ClassVar[str] = "record"

    signals: bool
    """Whether the model has TeaCache's signal; only where `inside`."""

    inside: bool
    """Whether the stream keeps its shape, so that the first block's contribution can be told."""

    log: list[Change] = field(default_factory=list, compare=False)
    """What was written down."""

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        if self.inside:
            front = call.front(1, signal=self.signals)
            signal, added = front.signal, front.grown
            out = call.back(front)
        else:
            signal, added, out = None, None, call.whole()
        output = torch.cat([leaf.flatten(1) if leaf.ndim > 1 else leaf[None] for leaf in tree_leaves(out)], dim=1)
        first = memory.output is None
        self.log.append(
            Change(
                branch=call.branch,
                step=call.step,
                signal=None if signal is None or memory.signal is None else relative_change(signal, memory.signal),
                output=None if first or memory.output is None else relative_change(output, memory.output),
                added=() if added is None else tuple(relative_change(added, old) for old in reversed(memory.added)),
            )
        )
        memory.signal, memory.output = signal, output.clone()
        if added is not None:
            memory.added.append(added)
        return out


@dataclass(eq=False)
class Run:
    """One request as its scheduler saw it."""

    times: list[float] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)  # guided, one a step
    latents: torch.Tensor | None = None  # after the last step
    scheduler: Any = None  # a copy of it, as it was before the first step
    steps: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)  # its timesteps and further arguments

    def effects(self) -> list[float]:
        """What the scheduler adds to the final latent per unit of each step's output, from one run of it alone."""
        assert self.latents is not None
        # Every solver works element by element, so that one latent has room for all steps.
        sample = torch.zeros(1, len(self.steps), 1, 1, device=self.latents.device)
        for place, (timestep, arguments) in enumerate(self.steps):
            output = torch.zeros_like(sample)
            output[0, place] = UNIT
            sample = _previous(self.scheduler.step(output, timestep, sample, **arguments))
        return (sample.flatten() / UNIT).tolist()


@contextmanager
def recorded(scheduler: Any, *, outputs: bool = False) -> Iterator[Run]:
    """What passes through `scheduler.step` inside the block: the one place every pipeline comes by."""
    run, patched, step = Run(), vars(scheduler).get("step"), scheduler.step

    def record(model_output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if outputs and not run.steps:
            run.scheduler = copy.deepcopy(scheduler)
            vars(run.scheduler).pop("step")
        result = step(model_output, timestep, *args, **kwargs)
        run.times.append(float(timestep))
        if outputs:
            run.outputs.append(model_output.detach().float().cpu())
            run.steps.append((timestep, {name: value for name, value in kwargs.items() if name != "sample"}))
        run.latents = _previous(result)
        return result

    scheduler.step = record
    try:
        yield run
    finally:
        if patched is None:
            del scheduler.step
        else:
            scheduler.step = patched


def _previous(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample
