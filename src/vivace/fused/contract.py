"""`Fused`: what a file of hand-fused blocks provides; and the reasons to stay stock that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from vivace.attention.backend import Attend
from vivace.family import Split
from vivace.fused.elementwise import Elementwise, elementwise_for
from vivace.fused.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Fused:
    """The hand-fused blocks of one family.

    Every product is a plain linear's, a module's call or a `Stack`'s, so that quantised linears and adapters beside
    linears are served too.
    """

    summary: str  # what is fused, for the report
    check: Callable[[Any], str | None]  # why this denoiser cannot be fused
    declines: Callable[..., str | None]  # declines(**forward_kwargs): why one call must take the stock path
    build: Callable[[Any, Parts], Split]
    outside: Callable[[Any], Iterable[torch.nn.Module | torch.Tensor]] | None = None
    """What of blocks more than one norm's vectors is read outside of their steps: by the prologue, `once` or the block
    before. It stays on the device where blocks are streamed. None: they cannot be."""

    def fuse(self, denoiser: Any, *, attend: Attend, undo: ExitStack, elementwise: Elementwise | None = None) -> Split:
        """The fused Split of a denoiser as it is now, with `attend` for its attention.

        Weights that are rearranged stay the denoiser's own parameters (views of the new layout); what puts them back
        goes on `undo`. Called again, after the undo, whenever weights were moved, cast, loaded or adapted. The
        arithmetic is the one for its device unless another form is given.
        """
        form = elementwise or elementwise_for(denoiser.device)
        return self.build(denoiser, Parts(attend=attend, elementwise=form, undo=undo))


def foreign_attention(attentions: Iterable[tuple[str, Any]], *, known: tuple[type, ...]) -> str | None:
    """Why one of these attention modules (name of its block, module) does not compute what is fused, or None."""
    for name, attention in attentions:
        processor = attention.processor
        if type(processor) not in known:
            return f"{name} has a {type(processor).__name__}"
        if any(getattr(processor, own, None) is not None for own in ("_attention_backend", "_parallel_config")):
            return (
                f"{name} has an attention backend of diffusers' own; vivace.accelerate(pipe, attention=...) sets ours"
            )
        if getattr(attention, "fused_projections", False):
            return f"{name} has its projections fused by diffusers; pipe.unfuse_qkv_projections() first"
    return None


def brings(attention_kwargs: Mapping[str, Any] | None) -> str | None:
    """Why a call with these attention kwargs takes the stock path: it brings more than a LoRA strength. Or None."""
    more = sorted(set(attention_kwargs or {}) - {"scale"})
    return f"the call brings {', '.join(more)}" if more else None
