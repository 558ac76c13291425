"""The lane: what happens when an accelerated denoiser is called."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch.utils._pytree import tree_flatten, tree_leaves

from vivace import request
from vivace.attention.backend import Attend
from vivace.attention.ends import Ends, exact_ends
from vivace.attention.native import NATIVE
from vivace.attention.packed import Packed
from vivace.attention.route import Route
from vivace.attention.space_time import Grid, arranged
from vivace.autocast import autocast_type
from vivace.cache.layer import Cache
from vivace.family import Block, Split, State
from vivace.fused.contract import Fused
from vivace.fused.foresight import Foreseen
from vivace.lora.adapters import DENOISER_METHODS, REWRITES, SHOWS, Adapters, lowered, lowering
from vivace.lora.strength import strength_in, without_strength
from vivace.memory.here import bring_of
from vivace.memory.joined import fixed
from vivace.one_off import give_class
from vivace.passes.accumulate import narrow
from vivace.passes.target import device_of, in_inference, types_of
from vivace.watch import Changed, Watch, holds_own_forward

logger = logging.getLogger(__name__)

MEMO = 4
"""Prompts whose step-independent part one request keeps; guidance in two calls takes two."""


class Run(Protocol):
    """Runs one named segment of a denoiser call: directly, or as a recorded graph."""

    def __call__(self, name: str, segment: Callable[..., Any], /, **kwargs: Any) -> Any: ...

    def apart(self, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        """Run one that reads more than its arguments: never recorded."""
        ...

    def clear(self) -> None: ...


class Direct:
    """Runs a segment as it is."""

    def __call__(self, name: str, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        return segment(**kwargs)

    def apart(self, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        return segment(**kwargs)

    def clear(self) -> None:
        pass


class Lane:
    """One denoiser's call: the fused blocks where they serve, else its stock forward, with attention routed.

    `attend`, `route`, `grid`, `narrow`, `ends`, `run`, `cache` and `fuse` are set by the passes before `install` puts
    the lane in place.
    """

    def __init__(self, name: str, denoiser: torch.nn.Module, *, named_blocks: bool = False) -> None:
        self.name = name
        self.denoiser = denoiser
        self.attend: Attend = NATIVE.attend
        self.route: Route | None = None
        self.grid: Grid | None = None  # how a call's tokens lie, where attention asks
        self.narrow = False  # whether 16-bit products add up in 16 bit
        self.ends: Ends | None = None  # steps of a request whose attention is exact
        self.run: Run = Direct()
        self.cache: Cache | None = None
        self.split: Split | None = None
        self.adapters: Adapters | None = None  # None: LoRA layers are PEFT's
        self.calls: Counter[str] = Counter()  # what served, or why the stock forward did -> calls
        self.first_seconds: float | None = None  # of the first call, with whatever it compiled or recorded
        self.moved: Callable[[], None] = lambda: None  # what to do when the denoiser went to another kind of device
        self._stock = type(denoiser).forward
        self._names = list(inspect.signature(self._stock).parameters)[1:]
        self._named_blocks = named_blocks
        self._device_type = device_of(denoiser).type
        self._fused: Fused | None = None
        self._unfusable: str | None = None
        self._split_undo = ExitStack()
        self._watch: Watch | None = None
        self._inference = in_inference(denoiser)  # what is made of weights is of their kind
        self._open = self._moves = self._streams = False
        self._lock = threading.RLock()

    def install(self, *, members: dict[str, Any], undo: ExitStack) -> None:
        """Give the denoiser a class whose forward is this lane; `members` are added to that class."""
        stock, lane = type(self.denoiser), self

        @functools.wraps(stock.forward)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            # A copied offload hook may hold this function, with another module.
            return lane(*args, **kwargs) if module is lane.denoiser else stock.forward(module, *args, **kwargs)

        @functools.wraps(stock._apply)
        def _apply(module: Any, *args: Any, **kwargs: Any) -> Any:
            result = stock._apply(module, *args, **kwargs)
            # At once: an offloaded denoiser must not leave its fused weights on the device.
            lane.release()
            return result

        def held() -> tuple[Adapters | None]:
            return (lane.adapters,)

        members = {
            **lowering(stock, DENOISER_METHODS, adapters=held),
            "forward": forward,
            "_apply": lowered(_apply, REWRITES, adapters=held),
            "__deepcopy__": lowered(_deepcopy, SHOWS, adapters=held),
            **members,
        }
        if hasattr(stock, "cache_context"):
            members["cache_context"] = _branching(stock)
        with _hook_lifted(self.denoiser):
            take_back = give_class(self.denoiser, members)
        self._open = True
        undo.callback(self._uninstall, take_back)

    def fuse(self, fused: Fused) -> str | None:
        """Serve calls with these fused blocks from now on. Returns why the stock ones stay for now, if they do."""
        self._fused = fused
        self._build()
        return self._unfusable

    def place(self, device: torch.device, *, moves: bool, streams: bool) -> None:
        """The denoiser computes on `device` from now on. With `moves` its weights have another place in every call.

        Where it `streams`, blocks' weights travel side by side as they are, and nothing may give them other memory.
        """
        self._device_type, self._moves, self._streams = device.type, moves, streams

    def release(self) -> None:
        """Forget everything that was built from the weights; the next call builds it again."""
        with self._lock, torch.inference_mode(self._inference):
            # First: each weight's shared memory goes as soon as the weight has its own again.
            self._watch = self.split = None
            self._split_undo.close()
            self.run.clear()
            if self.cache is not None:
                self.cache.release()

    def outdate(self) -> None:
        """Have the next call build again. Waits for nobody: whoever holds the adapters' lock may say so."""
        self._watch = None
        self.run.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward: its arguments, its result."""
        if not self._open:
            return self._stock(self.denoiser, *args, **kwargs)
        started = time.perf_counter()
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        late = self.cache is not None and self._watch is not None
        self._follow(kwargs, late=late)
        if device_of(self.denoiser).type != self._device_type:
            self.moved()
            return self.denoiser.forward(**kwargs)
        with self._settings(kwargs), exact_ends(self.ends) if self.ends else nullcontext():
            try:
                out = self._serve(self._settled(kwargs), check=self._check if late else None)
            except Changed:
                self._follow(kwargs)
                out = self._serve(self._settled(kwargs))
        if self.first_seconds is None:
            if self._device_type == "cuda":
                torch.cuda.synchronize()
            self.first_seconds = time.perf_counter() - started
        return out

    def through(self, run: Run, kwargs: dict[str, Any]) -> Any:
        """The denoiser's call with the decisions of the cache here, and its segments run by `run`: a server's.

        `run` brings each of them to `segment`, in whatever thread computes, alone or joined with those of others.
        """
        self._follow(kwargs)
        return self._serve(kwargs, run=run)

    @property
    def masks(self) -> bool:
        """Whether attention with a mask is the very same as without."""
        return self.route is None or (self.route.backend.masks and self.route.backend.exact)

    @property
    def at_end(self) -> bool:
        """Whether the current request is at a step whose attention is exact."""
        return self.ends is not None and self.ends.hold(request.current())

    def segment(self, run: Callable[..., Any], segment: Callable[..., Any], end: bool, /, **kwargs: Any) -> Any:
        """Compute one segment of a call that went `through`, by `run`; `end` says what `at_end` did."""
        split = next((one for one in (segment, *getattr(segment, "args", ())) if isinstance(one, Split)), None)
        if split is not None and split.once is not None and not {*split.once_inputs}.isdisjoint(kwargs):
            kwargs["once"] = self._once(split, kwargs, foresee=False)  # joined with others, it is of many requests
        token = request.EXACT.set(end)
        try:
            with self._settings(kwargs):
                return run(segment, **kwargs)
        finally:
            request.EXACT.reset(token)

    @contextmanager
    def _settings(self, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Attention goes where the pass said, and is told how the tokens lie where it asks; products add up as said."""
        told = arranged(self.grid, self.denoiser, kwargs) if self.grid else nullcontext()
        with self.route or nullcontext(), told, narrow() if self.narrow else nullcontext():
            yield

    def _serve(self, kwargs: dict[str, Any], run: Run | None = None, check: Callable[..., None] | None = None) -> Any:
        split, served_by = self._way(kwargs)
        self._count(served_by, warn=split is None and self._fused is not None)
        if split is not None and split.once is not None and run is None:
            kwargs["once"] = self._once(split, kwargs)
        run = run or self.run
        forward = split or self._whole
        if self.cache is None:
            return run("forward", forward, **kwargs)
        check = check or (lambda spared=(): None)
        return self.cache(kwargs, forward=forward, run=run, split=split, served_by=served_by, check=check)

    def _settled(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments, without a LoRA strength that has been settled."""
        kept = self.adapters is None or self.adapters.refused
        return dict(kwargs) if kept else without_strength(kwargs)

    def _whole(self, **kwargs: Any) -> Any:
        """The stock forward."""
        with bring_of(self.denoiser)([self.denoiser]):
            return self._stock(self.denoiser, **kwargs)

    def _way(self, kwargs: Mapping[str, Any]) -> tuple[Split | None, str]:
        """The fused blocks, if they serve such a call; and what does."""
        reason = self._declined(kwargs)
        split = None if reason else self.split
        return split, "fused blocks" if split is not None else reason or "stock blocks"

    def _declined(self, kwargs: Mapping[str, Any]) -> str | None:
        if self._fused is None:
            return None
        if self._unfusable:
            return self._unfusable
        if torch.is_grad_enabled():
            return "gradients are enabled, and fused blocks only go forward (use torch.no_grad())"
        cast = autocast_type(torch.device(self._device_type))
        if cast is not None and cast not in (held := types_of(self.denoiser)):
            names = ", ".join(str(one).removeprefix("torch.") for one in held)
            return f"its weights are in {names}, and autocast asks for {str(cast).removeprefix('torch.')}"
        return self._fused.declines(**kwargs)

    def _follow(self, kwargs: Mapping[str, Any], *, late: bool = False) -> None:
        """Bring the denoiser's adapters up to date; unless that is for later, build again if it is not what it was."""
        with self._lock, torch.inference_mode(self._inference):
            if self._watch is None or (not late and self._watch.changed()):
                self.release()
                if self.adapters is not None:
                    # A layer may have come in by no method of the denoiser's.
                    self.adapters.lift()
            if self.adapters is not None:
                self.adapters.settle(strength_in(kwargs))
            if self._watch is None:
                # Also where what was settled has let go of it.
                self.release()
                self._build()

    def _check(self, spared: Sequence[torch.nn.Module] = ()) -> None:
        """Raises Changed where the denoiser is not what it was; what lies inside `spared` modules may be.

        Looking at every weight takes longer than a step that a cache skips, so that a cache decides when.
        """
        with self._lock:
            if self._watch is None or self._watch.sparing(spared).changed():
                raise Changed

    def _build(self) -> None:
        """Build what is made from the weights as they are now."""
        from vivace.passes.fuse import unfusable

        self._unfusable = unfusable(self.denoiser, self._fused) if self._fused else None
        if self._fused and self._unfusable is None:
            with fixed() if self._streams else nullcontext():
                split = self._fused.fuse(self.denoiser, attend=self.attend, undo=self._split_undo)
            self.split = replace(split, bring=bring_of(self.denoiser))
            if self._named_blocks:
                self.split = replace(self.split, blocks=tuple(map(_announced, self.split.blocks)))
        packs = self.split is not None and isinstance(self.attend, Packed)
        self._watch = Watch(self.denoiser, storages=not self._moves, vectors=packs)

    def _once(self, split: Split, kwargs: Mapping[str, Any], *, foresee: bool = True) -> Mapping[str, Any]:
        """What the split computes once per prompt, remembered for the length of the request."""
        given = {name: kwargs.get(name) for name in split.once_inputs}
        leaves, spec = tree_flatten(given)
        now = request.current()
        # Inference tensors keep no version, so a change in place would go unseen.
        if now is None or any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in leaves):
            return split.prepare(kwargs)
        memo = now.memo.setdefault(self, OrderedDict())
        shapes = tree_leaves([kwargs.get(name) for name in split.once_shapes])
        key = (
            id(split),
            foresee,
            self.adapters.version if self.adapters else 0,
            spec,
            *((id(leaf), leaf._version) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
            *((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in shapes),
        )
        if key not in memo:
            # The inputs and the split are held too: an id names an object only as long as it lives.
            once = split.prepare(kwargs)
            memo[key] = (once, self._foreseen(split, once, kwargs) if foresee else None, leaves, split)
            if len(memo) > MEMO:
                memo.popitem(last=False)
        once, foreseen, *_ = memo[key]
        return once if foreseen is None else {**once, "made": foreseen.at(kwargs["timestep"])}

    def _foreseen(self, split: Split, once: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Foreseen | None:
        """What later steps of this request find made; where weights come and go there is no memory for it."""
        now = request.current()
        if split.foresight is None or self._moves or self._streams or now is None or now.timesteps is None:
            return None
        return split.foresight(now.timesteps, once, kwargs)

    def _count(self, served_by: str, *, warn: bool) -> None:
        if warn and served_by not in self.calls:
            logger.warning("%s takes its stock forward: %s", self.name, served_by)
        self.calls[served_by] += 1

    def _uninstall(self, take_back: Callable[[], None]) -> None:
        self._open = False
        self.release()
        with _hook_lifted(self.denoiser):
            take_back()


def _deepcopy(module: Any, memo: dict[int, Any]) -> Any:
    construct, arguments, state = module.__reduce_ex__(4)[:3]
    clone = memo[id(module)] = construct(*arguments)
    clone.__setstate__(copy.deepcopy(state, memo))
    return clone


def _announced(block: Block) -> Block:
    """The block, which first says its name to whoever asks what computes."""

    def forward(state: State) -> State:
        request.LAYER.set(block.name)
        return block.forward(state)

    return replace(block, forward=forward)


def _branching(stock: type) -> Any:
    """`cache_context`, through which some pipelines say which guidance branch they call, noted in the request."""

    @functools.wraps(stock.cache_context)  # pyright: ignore[reportAttributeAccessIssue]
    @contextmanager
    def cache_context(module: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        now = request.current()
        if now is not None:
            now.branch = name
        try:
            with stock.cache_context(module, name, *args, **kwargs):  # pyright: ignore[reportAttributeAccessIssue]
                yield
        finally:
            if now is not None:
                now.branch = None

    return cache_context


@contextmanager
def _hook_lifted(module: torch.nn.Module) -> Iterator[None]:
    """Take accelerate's offload hook off while the class changes, so that it wraps the forward of the new class."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
    # What the removal (or an earlier one) leaves is the class's own forward, which would hide the new class's.
    if holds_own_forward(module):
        del module.__dict__["forward"]
    yield
    if hook is not None:
        add_hook_to_module(module, hook)
