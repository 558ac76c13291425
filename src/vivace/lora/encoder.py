"""LoRA layers around the quantised linears of a text encoder: they stay in its tree, where PEFT computes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from vivace.errors import InputError
from vivace.lora.adapters import FUSES, READS
from vivace.quant.originals import Base


class Quantised:
    """A text encoder, linears of which others stand in for, wherever PEFT moves these."""

    def __init__(self, encoder: torch.nn.Module, base: Base) -> None:
        self.encoder, self.base = encoder, base
        self._depth = 0

    @contextmanager
    def lowered(self, kind: str) -> Iterator[None]:
        """The encoder with plain linears, which alone PEFT adapts, for a method of that kind, within the block."""
        if kind == FUSES and any(isinstance(module, BaseTunerLayer) for module in self.encoder.modules()):
            raise InputError(
                f"the linears of the {type(self.encoder).__name__} are quantised, so nothing can be fused into them; "
                "encoders='off' leaves them in 16 bit"
            )
        with ExitStack() as until:
            if kind != READS and self._depth == 0:
                for swap in self.base.swaps:
                    until.callback(swap.bare())
                self._exchange({id(swap.stand_in): swap.original for swap in self.base.swaps})
                until.callback(self._exchange, {id(swap.original): swap.stand_in for swap in self.base.swaps})
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def close(self) -> None:
        """The originals for good."""
        self._exchange({})
        self.base.put_back()

    def _exchange(self, others: Mapping[int, torch.nn.Module]) -> None:
        """Put `others` in the places of the modules with these ids, and note where those that stand in are."""
        places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for parent in [*self.encoder.modules()]:
            for leaf, child in parent._modules.items():
                parent._modules[leaf] = child = others.get(id(child), child)
                places.setdefault(id(child), []).append((parent, leaf))
        for swap in self.base.swaps:
            swap.places = places.get(id(swap.stand_in), swap.places)
