"""Guidance reuse: the unconditional half follows from the conditional one and their difference at an earlier step.

The difference between the two changes slowly, so it is computed at every n-th step only; and outside an interval of
the run there is no guidance at all (arXiv 2404.07724). Half a step's work is saved where the halves are one batch, a
whole call where they are two.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy
from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.cache.call import Call
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """Conditional minus unconditional output, per tensor of the output, at the last step that computed both."""

    difference: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class GuidanceReuse(Policy):
    """Compute the unconditional half only now and then."""

    name: ClassVar[str] = "guidance"
    holds: ClassVar[Holds] = Holds(outputs=1)

    every: int = 2
    """One step in so many computes both halves."""

    warmup: int = 3
    """Guided steps at the beginning that always compute both."""

    begin: float = 0.0
    """Share of the steps before which there is no guidance; the first step has it where both halves are one batch."""

    end: float = 1.0
    """Share of the steps after which there is no guidance."""

    least: ClassVar = {"every": 1, "warmup": 1}
    most: ClassVar = {"begin": 1, "end": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin >= self.end:
            raise InputError(
                f"guidance: from begin={self.begin:g} to end={self.end:g} there is no step with guidance; "
                "give an end above begin, or guidance scale 1"
            )

    def refuses(self, target: Target) -> str | None:
        family, pipeline = target.family, type(target.subject)
        if hasattr(pipeline, "do_perturbed_attention_guidance"):
            return "perturbed attention guidance has halves of its own"
        if family is None or family.guidance == "none":
            return "this model is not known to compute guidance by a second, unconditional half"
        if family.guidance == "batched" and family.listed:
            return f"{family.title} takes guidance's halves as lists, the conditional one first; use planned or dicache"
        if "image_guidance_scale" in inspect.signature(pipeline.__call__).parameters:
            return "guidance by text and by a picture computes three thirds of a batch, not two halves"
        bare = target.subject in target.denoisers.values()
        if family.guidance != "batched" and not bare and not _names_halves(pipeline):
            return f"{pipeline.__name__} computes no unconditional half, or does not say which of its calls it is"
        return None

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        first, last = int(self.begin * len(call.schedule)), int(self.end * len(call.schedule))
        guided = first <= call.step < last
        full = call.step - first < self.warmup or (call.step - first) % self.every == 0
        if call.branch is not None:
            return self._call(memory, call, guided=guided, full=full)
        halves = call.batch is not None and call.rows == 2 * call.batch
        return self._batch(memory, call, guided=guided, full=full) if halves else call.whole()

    def _call(self, memory: Memory, call: Call, *, guided: bool, full: bool) -> Any:
        """One of two calls; the unconditional one comes second, else it is computed."""
        from torch.utils._pytree import tree_flatten, tree_unflatten

        seen = call.shared.get("cond")
        if call.branch != "uncond" or seen is None or seen[0] != call.step:
            out = call.whole()
            if call.branch == "cond":
                leaves, spec = tree_flatten(out)
                call.shared["cond"] = (call.step, [leaf.clone() for leaf in leaves], spec)
            return out
        _, conditional, spec = seen
        if guided and (full or memory.difference is None):
            out = call.whole()
            memory.difference = [c - u for c, u in zip(conditional, tree_flatten(out)[0], strict=True)]
            return out
        call.skipped = True
        return tree_unflatten(_unconditional(conditional, memory, guided=guided), spec)

    def _batch(self, memory: Memory, call: Call, *, guided: bool, full: bool) -> Any:
        """Both halves in one batch, the unconditional one first."""
        import torch
        from torch.utils._pytree import tree_flatten, tree_unflatten

        if guided and (full or memory.difference is None):
            out = call.whole()
            pairs = [leaf.chunk(2) for leaf in tree_flatten(out)[0]]
            memory.difference = [c - u for u, c in pairs]
            return out
        call.skipped = True
        conditional, spec = tree_flatten(call.second_half())
        unconditional = _unconditional(conditional, memory, guided=guided)
        return tree_unflatten([torch.cat(pair) for pair in zip(unconditional, conditional, strict=True)], spec)


def _names_halves(pipeline: type) -> bool:
    """Whether a pipeline's loop says by diffusers' `cache_context("uncond")` which call is the unconditional one."""
    loops = (inspect.unwrap(vars(cls)["__call__"]) for cls in pipeline.__mro__ if "__call__" in vars(cls))
    return any("uncond" in loop.__code__.co_consts for loop in loops if inspect.isfunction(loop))


def _unconditional(conditional: list[Any], memory: Memory, *, guided: bool) -> list[Any]:
    if not guided:
        return [leaf.clone() for leaf in conditional]
    assert memory.difference is not None
    return [c - difference for c, difference in zip(conditional, memory.difference, strict=True)]
