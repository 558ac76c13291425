"""LoRA layers of an accelerated denoiser: held outside its module tree, their effect in the weights or beside them.

PEFT puts a layer of its own around every adapted linear, which fused blocks would not see and a recorded graph would
not follow. So while a lane serves, those layers stand outside the tree. Diffusers' and PEFT's own methods stay in
charge of them: whichever is called finds them back in their places, for as long as it runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft.tuners.lora import Conv2d, Conv3d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from vivace.errors import InputError
from vivace.quant.layers import foreign

if TYPE_CHECKING:
    from vivace.quant.originals import Base

PLAIN: tuple[type, ...] = (Linear, Conv2d, Conv3d)
"""Layers whose effect is `scale * up @ down`; of DoRA, LoKr and their kin PEFT's own forward is kept."""

READS, ADAPTS, LOADS, SHOWS, REWRITES, FUSES = "reads", "adapts", "loads", "shows", "rewrites", "fuses"
"""What a method does to a denoiser: looks at its layers, changes them, changes them and reads the weights, reads the
weights alone, changes those, adds the one to the other."""
WEIGHTS = (LOADS, SHOWS, REWRITES, FUSES)


def _by_keys(state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> str:
    # PEFT loads its own tensors through the same method.
    return ADAPTS if all(".lora_" in key for key in state_dict) else REWRITES


DENOISER_METHODS: dict[str, str | Callable[..., str]] = {
    "active_adapters": READS,
    "add_adapter": ADAPTS,
    "delete_adapters": ADAPTS,
    "disable_adapters": ADAPTS,
    "disable_lora": ADAPTS,
    "enable_adapters": ADAPTS,
    "enable_lora": ADAPTS,
    "enable_lora_hotswap": ADAPTS,
    "fuse_lora": FUSES,
    "load_lora_adapter": ADAPTS,
    "load_state_dict": _by_keys,
    "save_lora_adapter": LOADS,
    "save_pretrained": SHOWS,
    "set_adapter": ADAPTS,
    "set_adapters": ADAPTS,
    "state_dict": SHOWS,
    "unfuse_lora": FUSES,
    "unload_lora": ADAPTS,
}
PIPELINE_METHODS: dict[str, str | Callable[..., str]] = {
    "delete_adapters": ADAPTS,
    "disable_lora": ADAPTS,
    "enable_lora": ADAPTS,
    "enable_lora_hotswap": ADAPTS,
    "fuse_lora": FUSES,
    "get_active_adapters": READS,
    "load_lora_weights": LOADS,
    "set_adapters": ADAPTS,
    "set_lora_device": ADAPTS,
    "unfuse_lora": FUSES,
    "unload_lora_weights": ADAPTS,
}

Strength = float | Sequence[float | Mapping[str, float]]
"""One number, or for every request of a batch one, or one by adapter; what a mapping leaves out counts 1."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One adapter of one layer: `scale * up @ down`."""

    adapter: str
    down: torch.Tensor  # [R, in], of a convolution [R, in, *kernel]
    up: torch.Tensor  # [out, R], of a convolution [out, R, *ones]
    bias: torch.Tensor | None  # [out], added to the layer's bias
    scale: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a LoRA layer belongs in the tree, and what stands there while it is held out."""

    name: str  # dotted, within the denoiser
    parent: torch.nn.Module
    layer: Any  # PEFT's
    module: torch.nn.Module  # what computes while the layer is out
    original: Callable[[], torch.Tensor] | None = None  # the 16-bit weight, where `module` is quantised

    def stand(self, module: torch.nn.Module) -> None:
        """Let `module` stand in this place."""
        self.parent._modules[self.name.rpartition(".")[2]] = module

    def factors(self) -> list[Factor]:
        """What the layer adds as it is now: nothing when it is disabled or already fused into the weight."""
        layer = self.layer
        if layer.disable_adapters or layer.merged:
            return []
        return [
            Factor(
                adapter=name,
                down=layer.lora_A[name].weight,
                up=layer.lora_B[name].weight,
                bias=layer.lora_B[name].bias,
                scale=float(layer.scaling[name]),
            )
            for name in layer.active_adapters
            if name in layer.lora_A
        ]


class Effect(Protocol):
    """How adapters act: in the weights (`merged.py`), or beside the linears (`side.py`)."""

    @property
    def beside(self) -> bool:
        """Whether something now has to be computed beside the weights."""
        ...

    def refuses(self, place: Place) -> str | None:
        """Why a layer cannot act so and stays with PEFT, or None."""
        ...

    def settle(self, places: Iterable[Place], strength: Strength) -> None:
        """Make what the layers add now, times `strength`, part of what their modules compute."""

    def withdraw(self) -> None:
        """Leave every weight as it was before, to the bit."""

    def forget(self) -> None:
        """The weights are about to change, or have: what was remembered of them holds no longer."""


class Adapters:
    """The LoRA layers of one denoiser."""

    def __init__(self, denoiser: torch.nn.Module, *, effect: Effect, bases: Sequence[Base] = ()) -> None:
        self.denoiser, self.effect = denoiser, effect
        self._bases = bases  # of quantised layers; filled later, by their pass
        self._bare: list[Callable[[], None]] = []  # give originals their bytes again
        self.version = 0  # counts what may have changed the denoiser's results
        self.refused: str | None = None  # why the layers are left in the tree
        self.writing: Callable[[], AbstractContextManager[Any]] = nullcontext  # around what changes weights in place
        self._places: list[Place] = []  # what is held out
        self._settled: Strength | None = None  # None: not yet
        self._depth = 0
        self._rewritten = False
        self._lock = threading.RLock()

    def lift(self) -> None:
        """Take every LoRA layer out of the tree, unless one is of a kind that is left to PEFT."""
        with self._lock:
            self._put_in()
            found = [*layers_of(self.denoiser, self._bases)]
            self._put_stand_ins()
            self.refused = next(
                (why for place in found if (why := _refuses(place) or self.effect.refuses(place))), None
            )
            self._settled = None
            if self.refused:
                self.effect.withdraw()
                return
            for place in found:
                if place.layer.disable_adapters and place.layer.merged:
                    # PEFT does so at the next forward, which would be the layer's own.
                    self.effect.withdraw()
                    self.effect.forget()
                    place.layer.unmerge()
                place.stand(place.module)
            self._places = found

    def settle(self, strength: Strength = 1.0) -> None:
        """Bring weights or sides up to what the layers say, times `strength`; quick when they are."""
        if strength == self._settled:
            return
        with self._lock:
            with self.writing():
                self.effect.settle(self._places, strength)
            self._settled = strength
            self.version += 1

    @contextmanager
    def lowered(self, kind: str = REWRITES) -> Iterator[None]:
        """The denoiser with its layers in their places, for a method of that kind, within the block."""
        with self._lock:
            quantised = any(base.swaps for base in self._bases)
            if kind == FUSES and quantised:
                raise InputError(
                    "the layers are quantised, so nothing can be fused into them; lora='merged' has the adapters in "
                    "their weights already, and vivace merge writes a model with them"
                )
            if kind in WEIGHTS:
                with self.writing():
                    self.effect.withdraw()
                self._settled = None
            self._rewritten |= kind in (REWRITES, FUSES)
            # Quantised layers show, move and load themselves.
            if self._depth == 0 and not (quantised and kind in (SHOWS, REWRITES)):
                self._put_in()
                self._put_originals()
            self._depth += 1
            settled = self._settled
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    if self._rewritten:
                        self.effect.forget()
                        self._rewritten = False
                    self.lift()
                    self._settled = settled if kind == READS else None

    def close(self) -> None:
        """The stock form for good."""
        with self._lock:
            self.effect.withdraw()
            self.effect.forget()
            self._put_in()

    def _put_originals(self) -> None:
        """PEFT adapts plain linears alone: let the originals stand for the quantised layers, without bytes."""
        for swap in (swap for base in self._bases for swap in base.swaps):
            self._bare.append(swap.bare())
            for parent, leaf in swap.places:
                if parent._modules.get(leaf) is swap.stand_in:
                    parent._modules[leaf] = swap.original

    def _put_stand_ins(self) -> None:
        for undo in self._bare:
            undo()
        self._bare.clear()
        for swap in (swap for base in self._bases for swap in base.swaps):
            for parent, leaf in swap.places:
                if parent._modules.get(leaf) is swap.original:
                    parent._modules[leaf] = swap.stand_in

    def _put_in(self) -> None:
        for place in self._places:
            place.stand(place.layer)
        self._places = []


@contextmanager
def held_out(denoisers: Iterable[torch.nn.Module], bases: Sequence[Base] = ()) -> Iterator[None]:
    """The denoisers as they will be with their LoRA layers held out, within the block: what passes have to look at."""
    places = [place for denoiser in denoisers if refuses(denoiser) is None for place in layers_of(denoiser, bases)]
    for place in places:
        place.stand(place.module)
    try:
        yield
    finally:
        for place in places:
            place.stand(place.layer)


def layers_of(denoiser: torch.nn.Module, bases: Sequence[Base] = ()) -> Iterator[Place]:
    """The adapter layers in a denoiser's tree; those of originals in `bases` belong to what stands in for them."""
    swaps = {id(swap.original): (base, swap) for base in bases for swap in base.swaps}
    for parent, name, child in _tuned(denoiser):
        module = child.get_base_layer()
        if id(module) not in swaps:
            yield Place(name=name, parent=parent, layer=child, module=module)
            continue
        base, swap = swaps[id(module)]
        original = functools.partial(base.original, swap)
        yield Place(name=name, parent=parent, layer=child, module=swap.stand_in, original=original)


def _tuned(denoiser: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """The adapter layers, each with its parent and dotted name; what is inside of them, most of the tree, is left."""
    found, seen, todo = list[tuple[torch.nn.Module, str, Any]](), {denoiser}, [("", denoiser)]
    while todo:
        path, parent = todo.pop()
        inner = []
        for leaf, child in parent._modules.items():
            name = f"{path}.{leaf}" if path else leaf
            if isinstance(child, BaseTunerLayer):
                found.append((parent, name, child))
            elif child is not None and child not in seen:
                seen.add(child)
                inner.append((name, child))
        todo += reversed(inner)
    return found


def refuses(denoiser: torch.nn.Module) -> str | None:
    """Why a denoiser's LoRA layers have to stay with PEFT, or None."""
    return foreign(denoiser) or next((why for place in layers_of(denoiser) if (why := _refuses(place))), None)


def _refuses(place: Place) -> str | None:
    layer = place.layer
    if type(layer) not in PLAIN:
        return f"{place.name} has a {type(layer).__module__}.{type(layer).__name__}, which is no plain LoRA"
    assert isinstance(layer, LoraLayer)
    if layer.lora_variant:
        return f"{place.name} has a {type(next(iter(layer.lora_variant.values()))).__name__}"
    if getattr(place.module, "groups", 1) != 1:
        return f"{place.name} is a grouped convolution"
    if any(parameter.is_meta for parameter in place.module.parameters()):
        return f"{place.name} is offloaded"
    return None


class Holder(Protocol):
    """Who holds what methods have to find in its place."""

    def lowered(self, kind: str) -> AbstractContextManager[None]:
        """The module as a method of that kind has to find it, within the block."""
        ...


Held = Callable[[], Iterable[Holder | None]]


def lowering(stock: type, methods: Mapping[str, str | Callable[..., str]], *, adapters: Held) -> dict[str, Any]:
    """Those of `methods` that `stock` has, as members of a class: each finds the layers of `adapters()` in the tree."""
    return {
        name: lowered(getattr(stock, name), kind, adapters=adapters)
        for name, kind in methods.items()
        if hasattr(stock, name)
    }


def lowered(method: Callable[..., Any], kind: str | Callable[..., str], *, adapters: Held) -> Callable[..., Any]:
    """A method of a denoiser or pipeline that runs with the layers of `adapters()` in the tree."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for one in adapters():
                if one is not None:
                    stack.enter_context(one.lowered(kind if isinstance(kind, str) else kind(*args, **kwargs)))
            return method(self, *args, **kwargs)

    return call
