"""A module whose weights live on the host: each block's come to the device while the ones before it compute."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any, Literal, NamedTuple

import torch

from vivace.errors import InputError
from vivace.memory.group import Group, Joined
from vivace.memory.placement import SLOTS
from vivace.one_off import give_class

Stay = Literal["always", "turn", "call"]
"""How long what is not streamed stays on the device: until the undo, until another takes its turn, for one call."""


class Turn:
    """Modules of which one at a time has its weights on the device."""

    def __init__(self) -> None:
        self.holder: Stream | None = None

    def take(self, stream: Stream) -> None:
        if self.holder is not stream:
            if self.holder is not None:
                self.holder.leave()
            self.holder = stream
            stream.arrive()


class Stream:
    """The weights of one module: some blocks and everything outside of blocks held together, the others streamed.

    `blocks` are the module's repeated blocks, `streamed` the indices of those whose weights come for their step alone,
    but for the tensors whose ids are in `kept`: these are held. What is held stays as long as `stay` says. A call of
    the module brings all of its blocks, or with `in_parts` what computes says which (`bring`). Nothing is ever written
    back: weights that change while they are on the device (in training) lose that.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        blocks: Sequence[torch.nn.Module],
        streamed: Sequence[int],
        device: torch.device,
        kept: Collection[int] = (),
        joined: Joined = (),
        stay: Stay = "always",
        turn: Turn | None = None,
        in_parts: bool = False,
    ) -> None:
        self.module, self.device, self.stay, self.turn, self.in_parts = module, device, stay, turn, in_parts
        pin = device.type == "cuda"
        self.blocks = {index: blocks[index] for index in sorted(streamed)}
        mine = {i: [t for t in tensors_of(block) if id(t) not in kept] for i, block in self.blocks.items()}
        away = {id(tensor) for tensors in mine.values() for tensor in tensors}
        held = [tensor for tensor in tensors_of(module) if id(tensor) not in away]
        self.groups = {
            index: Group(tensors, module=self.blocks[index], pin=pin, joined=joined) for index, tensors in mine.items()
        }
        self.held = Group(held, module=module, pin=pin, joined=joined)
        self._known = {id(tensor) for group in (self.held, *self.groups.values()) for tensor, _ in group.home}
        self._arrived: torch.Tensor | None = None  # the held group's bytes on the device
        self._slots: list[torch.Tensor] = []
        # Another priority than that of the stream that graphs are recorded on: torch hands out few, in turn.
        self._copies = torch.cuda.Stream(device, priority=-1) if pin else None
        self._orders: dict[tuple[int, ...], tuple[int, ...]] = {}  # modules that compute -> their blocks, as called
        self._trip: Trip | None = None
        self._lock = threading.RLock()

    def install(self, *, undo: ExitStack) -> None:
        """Let the module's and its blocks' calls bring the weights they need."""
        undo.callback(self._give_back)
        for index, block in self.blocks.items():
            come = functools.partial(self._here, index)
            members = {"forward": _within(type(block), come), "vivace_here": staticmethod(come)}
            undo.callback(give_class(block, members))
        members = {
            "forward": _within(type(self.module), self._during_call),
            "_apply": self._module_apply(),
            "device": property(lambda _: self.device),
            "vivace_device": self.device,
            "vivace_bring": staticmethod(self.bring),
        }
        undo.callback(give_class(self.module, members))
        if self.stay == "always":
            self.arrive()

    @property
    def nbytes(self) -> int:
        """Of the streamed blocks: what a call of the module moves."""
        return sum(group.nbytes for group in self.groups.values())

    @torch.inference_mode(False)
    def arrive(self) -> None:
        """Bring what is held, and room for what is streamed."""
        if self._arrived is None:
            self._arrived = self.held.host.to(self.device, non_blocking=True, copy=True)
            self.held.point(self._arrived)
        if self.groups and not self._slots:
            size = max(group.nbytes for group in self.groups.values())
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]

    def leave(self) -> None:
        """Give the device's memory back. Every trip has ended, and with it what was copied."""
        for group in (self.held, *self.groups.values()):
            group.stay()
        self._arrived, self._slots = None, []

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block weights are changed in place, what is held on the device, the others on the host."""
        if self.device.type == "cuda":
            # Copies of calls that are still computing read the host's.
            torch.cuda.synchronize(self.device)
        try:
            yield
        finally:
            if self._arrived is not None and self.stay != "always":
                self.held.host.copy_(self._arrived)

    @contextmanager
    def bring(self, modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Within the block these modules compute, in the order in which they did the last time.

        All that is copied for them is copied between its begin and its end, as the device sees it, and always into the
        same memory: so that it can be recorded.
        """
        with self._lock:
            if self._trip is not None:
                # A part of what is under way.
                yield
                return
            modules = list(modules)
            key = tuple(map(id, modules))
            if key not in self._orders:
                inside = {id(part) for module in modules for part in module.modules()}
                self._orders[key] = tuple(index for index, block in self.blocks.items() if id(block) in inside)
            trip = self._trip = Trip(self.groups, self._slots, order=self._orders[key], copies=self._copies)
            try:
                trip.begin()
                yield
                self._orders[key] = tuple(trip.came)
            finally:
                self._trip = None
                trip.end()

    @contextmanager
    def _here(self, index: int) -> Iterator[None]:
        """The weights of one streamed block."""
        with self._lock, self.bring([self.blocks[index]]):
            trip = self._trip
            assert trip is not None
            if trip.now == index:
                # What computes has asked already, and its call asks again.
                yield
                return
            trip.take(index)
            try:
                yield
            finally:
                trip.leave(index)

    @contextmanager
    def _during_call(self) -> Iterator[None]:
        """The weights of one call of the module."""
        with self._lock:
            if self.turn is not None:
                self.turn.take(self)
            else:
                self.arrive()
            self._bring_strays()
            try:
                if self.in_parts:
                    yield
                else:
                    with self.bring([self.module]):
                        yield
            finally:
                if self.stay == "call":
                    self.leave()

    def _bring_strays(self) -> None:
        """Adapters that came later belong to no group: they stay on the device."""
        if getattr(self.module, "peft_config", None):
            for tensor in tensors_of(self.module):
                if id(tensor) not in self._known:
                    tensor.data = tensor.data.to(self.device)

    def _module_apply(self) -> Callable[..., Any]:
        def _apply(module: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
            dtype = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), torch.float32)
            made = fn(torch.empty(0, dtype=dtype, device=self.device))
            if (made.dtype, made.device.type) != (dtype, self.device.type):
                raise InputError(
                    f"the weights of this {type(module).__name__} are placed by vram=; call vivace.restore before "
                    "moving or casting it"
                )
            return module

        return _apply

    def _give_back(self) -> None:
        if self._arrived is not None and self.stay == "always":
            # What was written there meanwhile: fused adapters, another state dict.
            self.held.host.copy_(self._arrived)
        self.leave()
        for group in (self.held, *self.groups.values()):
            group.give_back()


class Coming(NamedTuple):
    """A block whose weights are on their way, or there."""

    index: int
    slot: torch.Tensor
    there: Any  # recorded when they are; None where copies are done at once


class Trip:
    """One way through some blocks: while one computes, the weights of those that follow come, as far as there is room.

    Copies go by a stream of their own, which leaves the one that computes at `begin` and joins it at `end`: all that
    was computed before may still read the slots, and nothing is under way afterwards. In between a copy waits for what
    its slot was read by, and what computes for its copy.
    """

    def __init__(
        self, groups: Mapping[int, Group], slots: Sequence[torch.Tensor], *, order: Sequence[int], copies: Any
    ) -> None:
        self.groups, self.order, self.copies = groups, order, copies
        self.now: int | None = None  # the block that computes
        self.came: dict[int, None] = {}  # those that have, in their order
        self._rest, self._coming = deque(order), deque[Coming]()
        # They are taken and given back in turn.
        self._slots, self._count = cycle(slots), len(slots)
        self._device = None if copies is None else copies.device

    def begin(self) -> None:
        self._wait()
        self._start()

    def take(self, index: int) -> None:
        """Let the weights of block `index`, whose turn it is, be on the device."""
        assert self.now is None, "a streamed block computes within another"
        if not self._coming or self._coming[0].index != index:
            # Others were expected. What comes for them comes in vain.
            dropped = [one.index for one in self._coming]
            self._coming.clear()
            known = index in self.order
            after = self.order[self.order.index(index) + 1 :] if known else [*dropped, *self._rest]
            self._rest = deque([index, *after])
            self._wait()
            self._start()
        if self._coming[0].there is not None:
            torch.cuda.current_stream(self._device).wait_event(self._coming[0].there)
        self.groups[index].point(self._coming[0].slot)
        self.now = index
        self.came[index] = None

    def leave(self, index: int) -> None:
        """Block `index` has computed: its slot is free for the next one."""
        self.now = None
        self.groups[index].point(self.groups[index].host)
        self._coming.popleft()
        if self._rest:
            self._wait()
            self._start()

    def end(self) -> None:
        if self.copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self.copies)

    def _wait(self) -> None:
        """What is copied from now on comes after what was launched so far."""
        if self.copies is not None:
            self.copies.wait_stream(torch.cuda.current_stream(self._device))

    def _start(self) -> None:
        """Copy what is next, as far as slots are free."""
        while self._rest and len(self._coming) < self._count:
            index, slot = self._rest.popleft(), next(self._slots)
            self._coming.append(Coming(index, slot, self._copy(self.groups[index], slot)))

    def _copy(self, group: Group, slot: torch.Tensor) -> Any:
        if self.copies is None:
            slot[: group.nbytes].copy_(group.host)
            return None
        with torch.cuda.stream(self.copies):
            slot[: group.nbytes].copy_(group.host, non_blocking=True)
            return self.copies.record_event()


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _within(stock: type[Any], scope: Callable[[], Any]) -> Callable[..., Any]:
    """The forward of a class, in a scope of its own."""

    @functools.wraps(stock.forward)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        with scope():
            return stock.forward(module, *args, **kwargs)

    return forward
