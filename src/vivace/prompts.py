"""What a pipeline made of the prompts it saw last: the same prompt is not encoded twice."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._pytree import tree_leaves, tree_map_only

from vivace.autocast import autocast_type
from vivace.one_off import behind
from vivace.watch import Watch

PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


class Unkeyed(Exception):
    """An argument that nothing can be remembered by: an embedding, a picture."""


class Encoder:
    """One text encoder as far as its results depend on it: its modules, its weights' versions, its adapters."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self._watch: Watch | None = None
        self._generation = 0

    def key(self) -> Hashable:
        """Another value whenever the module may compute something else. Changes through `.data` are not seen."""
        # Weights may come and go from the device: what counts is whether they were replaced or written to.
        if self._watch is None or self._watch.changed():
            self._watch = Watch(self.module, storages=False)
            self._generation += 1
        tensors = (*self.module.parameters(), *self.module.buffers())
        written = sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        dtypes = frozenset(tensor.dtype for tensor in tensors)
        adapters = tuple(_adapter(m) for m in self.module.modules() if isinstance(m, BaseTunerLayer))
        return self._generation, written, dtypes, self.module.training, adapters


class Prompts:
    """The embeddings of a pipeline's last prompts, least recently used out first. Give it to `encode_prompt`."""

    def __init__(self, encoders: Mapping[str, torch.nn.Module], *, limit: int) -> None:
        self.limit = limit  # bytes
        self.hits = self.computed = self.passed = self.nbytes = 0
        self._encoders = {name: Encoder(module) for name, module in encoders.items()}
        self._kept: OrderedDict[Hashable, tuple[Any, int, tuple]] = OrderedDict()
        self._lock = threading.Lock()

    def method(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """`stock`, a pipeline class's `encode_prompt`, with this memory before it."""
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def encode_prompt(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                call = signature.bind(pipe, *args, **kwargs)
                call.apply_defaults()
                key, _ = self._key(pipe, {**call.arguments, "self": None})
            except (Unkeyed, TypeError):
                self.passed += 1
                return stock(pipe, *args, **kwargs)
            if (found := self._find(key)) is None:
                self.computed += 1
                found = stock(pipe, *args, **kwargs)
                # Asked again: in its first call an encoder may hook itself.
                self._keep(found, *self._key(pipe, {**call.arguments, "self": None}))
            else:
                self.hits += 1
                if (strength := call.arguments.get("lora_scale")) is not None:
                    pipe._lora_scale = strength  # which stock leaves behind
            return found

        return encode_prompt

    def to_dict(self) -> dict[str, int]:
        """The counts, for the report."""
        return {"hits": self.hits, "computed": self.computed, "passed": self.passed, "bytes": self.nbytes}

    def _key(self, pipe: Any, arguments: Mapping[str, Any]) -> tuple[Hashable, tuple]:
        """What the embeddings depend on, and the objects whose ids are in it."""
        if torch.is_grad_enabled():
            raise Unkeyed
        for name, encoder in self._encoders.items():
            if behind(getattr(pipe, name, None)) is not encoder.module or encoder.module.training:
                raise Unkeyed
        own = {n: v for n, v in vars(pipe).items() if isinstance(v, PLAIN) and not n.startswith("_")}
        parts = pipe.components.items()
        tools = tuple(behind(part) for name, part in parts if "tokenizer" in name or "processor" in name)
        key = (
            _frozen(arguments),
            _frozen(own),
            str(device := pipe._execution_device),
            torch.is_inference_mode_enabled(),
            autocast_type(device),
            tuple((id(tool), _size(tool)) for tool in tools),
            tuple(encoder.key() for encoder in self._encoders.values()),
        )
        return key, tools

    def _find(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            # A copy: what the pipeline is given is its own to write to.
            return _copied(self._kept[key][0])

    def _keep(self, made: Any, key: Hashable, held: tuple) -> None:
        size = sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        if size > self.limit:
            return
        with self._lock:
            if key not in self._kept:
                self._kept[key] = (_copied(made), size, held)
                self.nbytes += size
            while self.nbytes > self.limit:
                self.nbytes -= self._kept.popitem(last=False)[1][1]


def _adapter(layer: Any) -> Hashable:
    active, merged = tuple(layer.active_adapters), tuple(layer.merged_adapters)
    return active, merged, layer.disable_adapters, tuple(sorted(getattr(layer, "scaling", {}).items()))


def _size(tool: Any) -> int:
    """How many words a tokenizer knows: words can be added to it in place."""
    return len(tool) if hasattr(tool, "__len__") else 0


def _copied(made: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, made)


def _frozen(value: Any) -> Hashable:
    """A value that can be compared and hashed. Raises Unkeyed for what can be neither."""
    if isinstance(value, PLAIN):
        # 1, 1.0 and True are equal.
        return type(value), value
    if isinstance(value, list | tuple):
        return tuple, *map(_frozen, value)
    if isinstance(value, Mapping):
        return dict, *((name, _frozen(one)) for name, one in sorted(value.items()))
    raise Unkeyed
