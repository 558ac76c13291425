"""A module whose weights live on the host: each block's come to the device while the one before it computes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vivace.errors import InputError
from vivace.memory.pinned import hold
from vivace.memory.placement import SLOTS
from vivace.one_off import give_class
from vivace.quant.linear import QuantLinear

ALIGN = 256  # bytes: what the widest loads of kernels and copies want
Stay = Literal["always", "turn", "call"]
"""How long what is not streamed stays on the device: until the undo, until another takes its turn, for one call."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a group, and its place in the group's bytes."""

    tensor: torch.Tensor
    start: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        end = self.start + _span(self.shape, self.stride) * self.dtype.itemsize
        return flat[self.start : end].view(self.dtype).as_strided(self.shape, self.stride)


class Group:
    """Tensors that travel together: one flat piece of host memory, one copy."""

    def __init__(self, tensors: Sequence[torch.Tensor], *, module: torch.nn.Module, pin: bool) -> None:
        self.quantised = [layer for layer in module.modules() if isinstance(layer, QuantLinear)]
        self.home = [(tensor, tensor.device) for tensor in tensors]
        self.entries, end = [], 0
        for tensor in tensors:
            self.entries.append(Entry(tensor, end, tensor.shape, tensor.stride(), tensor.dtype))
            end += -(-_span(tensor.shape, tensor.stride()) * tensor.dtype.itemsize // ALIGN) * ALIGN
        self.nbytes = end
        self.host = hold(end, pin=pin)
        for entry in self.entries:
            entry.view(self.host).copy_(entry.tensor.data)
        self.point(self.host)

    def point(self, flat: torch.Tensor) -> None:
        """Let the tensors be views of `flat`."""
        for entry in self.entries:
            entry.tensor.data = entry.view(flat)
        for layer in self.quantised:
            # What it made of its weight may be a view of where that was.
            layer.cache.clear()

    def give_back(self) -> None:
        """Ordinary tensors again, where they were."""
        self.point(self.host)
        for tensor, device in self.home:
            tensor.data = tensor.data.clone() if device.type == "cpu" else tensor.data.to(device)


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

    `blocks` are the module's repeated blocks, `streamed` the indices of those whose weights come for their call alone;
    which one is called after which is learned in the first call. What is held stays as long as `stay` says. Nothing is
    ever written back: weights that change while they are on the device (in training) lose that.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        blocks: Sequence[torch.nn.Module],
        streamed: Sequence[int],
        device: torch.device,
        stay: Stay = "always",
        turn: Turn | None = None,
    ) -> None:
        self.module, self.device, self.stay, self.turn = module, device, stay, turn
        self.order = sorted(streamed)  # of their calls, as far as it is known
        self._called: dict[int, None] | None = {}  # in the first call, in their order
        pin = device.type == "cuda"
        mine = {index: _tensors(blocks[index]) for index in self.order}
        away = {id(tensor) for tensors in mine.values() for tensor in tensors}
        held = [tensor for tensor in _tensors(module) if id(tensor) not in away]
        self.groups = {index: Group(tensors, module=blocks[index], pin=pin) for index, tensors in mine.items()}
        self.held = Group(held, module=module, pin=pin)
        self._known = {id(tensor) for group in (self.held, *self.groups.values()) for tensor, _ in group.home}
        self._arrived: torch.Tensor | None = None  # the held group's bytes on the device
        self._slots: list[torch.Tensor] = []
        self._coming: dict[int, int] = {}  # block -> the slot it is in, or on the way to
        self._copies = torch.cuda.Stream(device) if pin else None
        self._ready: list[Any] = []  # by slot: recorded when its copy is there
        self._free: list[Any] = []  # by slot: recorded when its block has computed
        self._lock = threading.RLock()

    def install(self, *, blocks: Sequence[torch.nn.Module], undo: ExitStack) -> None:
        """Let the module's and its blocks' calls bring the weights they need."""
        undo.callback(self._give_back)
        for index in self.groups:
            undo.callback(give_class(blocks[index], {"forward": self._block_forward(blocks[index], index)}))
        members = {
            "forward": self._module_forward(),
            "_apply": self._module_apply(),
            "device": property(lambda _: self.device),
            "vivace_device": self.device,
        }
        undo.callback(give_class(self.module, members))
        if self.stay == "always":
            self.arrive()

    @property
    def nbytes(self) -> int:
        """Of the streamed blocks: what a call of the module moves."""
        return sum(group.nbytes for group in self.groups.values())

    def arrive(self) -> None:
        """Bring what is held, and room for what is streamed."""
        if self._arrived is None:
            self._arrived = self.held.host.to(self.device, non_blocking=True)
            self.held.point(self._arrived)
        if self.groups and not self._slots:
            size = max(group.nbytes for group in self.groups.values())
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
            if self._copies is not None:
                self._ready, self._free = ([torch.cuda.Event() for _ in range(SLOTS)] for _ in range(2))
                # The slots' memory may still be in use by what was there before.
                self._copies.wait_stream(torch.cuda.current_stream(self.device))

    def leave(self) -> None:
        """Give the device's memory back."""
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self.held.point(self.held.host)
        self._arrived, self._slots = None, []
        self._coming.clear()

    def written(self) -> None:
        """Weights were changed in place, what is held on the device, the others on the host."""
        # What is on its way may be from before.
        self._coming.clear()
        if self._arrived is not None and self.stay != "always":
            self.held.host.copy_(self._arrived)

    @contextmanager
    def during_call(self) -> Iterator[None]:
        """The weights of one call of the module."""
        with self._lock:
            if self.turn is not None:
                self.turn.take(self)
            else:
                self.arrive()
            self._bring_strays()
            if self.order:
                self._fetch(self.order[0])
            try:
                yield
                if self._called:
                    self.order, self._called = list(self._called), None
            finally:
                if self.stay == "call":
                    self.leave()

    @contextmanager
    def during_block(self, index: int) -> Iterator[None]:
        """The weights of one streamed block, and the next one's on their way."""
        slot = self._fetch(index)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[slot])
        group = self.groups[index]
        group.point(self._slots[slot])
        if self._called is not None:
            self._called[index] = None
        following = self._after(index)
        if following is not None:
            self._fetch(following, keep=index)
        try:
            yield
        finally:
            group.point(group.host)
            if self._copies is not None:
                self._free[slot].record(torch.cuda.current_stream(self.device))

    def _after(self, index: int) -> int | None:
        """The block that is called after this one; after the last, the first of the next step."""
        if index not in self.order or len(self.order) < 2:
            return None
        place = self.order.index(index) + 1
        if place < len(self.order):
            return self.order[place]
        return None if self.stay == "call" else self.order[0]

    def _fetch(self, index: int, *, keep: int | None = None) -> int:
        """Start a block's copy unless it is under way; returns its slot. Block `keep` is computing."""
        if index in self._coming:
            return self._coming[index]
        taken = list(self._coming.values())
        slot = next((slot for slot in range(SLOTS) if slot not in taken), None)
        if slot is None:
            # The block that came first has computed, or was never called.
            oldest = next(other for other in self._coming if other != keep)
            slot = self._coming.pop(oldest)
        self._coming[index] = slot
        group = self.groups[index]
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            if self._copies is not None:
                self._copies.wait_event(self._free[slot])
            self._slots[slot][: group.nbytes].copy_(group.host, non_blocking=True)
            if self._copies is not None:
                self._ready[slot].record(self._copies)
        return slot

    def _bring_strays(self) -> None:
        """Adapters that came later belong to no group: they stay on the device."""
        if getattr(self.module, "peft_config", None):
            for tensor in _tensors(self.module):
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

    def _module_forward(self) -> Callable[..., Any]:
        stock = type(self.module)

        @functools.wraps(stock.forward)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            with self.during_call():
                return stock.forward(module, *args, **kwargs)

        return forward

    def _block_forward(self, block: torch.nn.Module, index: int) -> Callable[..., Any]:
        stock = type(block)

        @functools.wraps(stock.forward)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            with self.during_block(index):
                return stock.forward(module, *args, **kwargs)

        return forward

    def _give_back(self) -> None:
        self.leave()
        for group in (self.held, *self.groups.values()):
            group.give_back()


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
