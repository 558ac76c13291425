"""The memory that a computation needs beside its weights, found by running it on shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
WORKSPACE = 256 * 2**20
"""What cuBLAS and cuDNN take for themselves."""


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that live at the same time."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Views of weights and arguments are no new memory.
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A forward builds small tables on the CPU: they count as if they were with the rest.
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Fused(TorchFunctionMode):
    """Attention as the fused kernels do it: no matrix of scores is ever there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            values = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            query, value = values["query"], values["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


class _Calling(torch.nn.Module):
    """A function that reads a module's weights as a forward, so that these can be swapped for shapes."""

    def __init__(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, **kwargs: Any) -> Any:
        return self.function(**kwargs)


def work(module: torch.nn.Module, method: str = "forward", /, **kwargs: Any) -> int | None:
    """Bytes that `module.method(**kwargs)` needs at its peak, beside weights, its results included.

    None where it needs values (a mask's length, a token's number).
    """
    found = on_shapes(module, getattr(module, method), **kwargs)
    return None if found is None else found[1] + WORKSPACE


def on_shapes(module: torch.nn.Module, function: Callable[..., Any], **kwargs: Any) -> tuple[Any, int] | None:
    """What `function(**kwargs)`, which reads `module`'s weights, gives, and the most bytes it needs beside them.

    Nothing is computed: weights, arguments and results are shapes. None where it needs values.
    """
    shapes = {
        f"module.{name}": torch.empty_like(tensor, device=META)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    arguments = tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device=META), kwargs)
    live = _Live([*shapes.values(), *(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor))])
    try:
        with _unchanged(module), torch.no_grad(), torch.device(META), _Fused(), live:
            result = torch.func.functional_call(_Calling(module, function), shapes, (), arguments)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return result, live.peak


@contextmanager
def _unchanged(module: torch.nn.Module) -> Iterator[None]:
    """What a module keeps of a call (tables of positions) is forgotten after the block: it has no values."""
    parts = list[Any](module.modules())
    # Some that keep tables are no modules.
    parts += [value for part in module.modules() for value in vars(part).values() if _plain(value)]
    before = [(vars(part), dict(vars(part))) for part in parts]
    try:
        yield
    finally:
        for state, known in before:
            for name in state.keys() - known.keys():
                del state[name]
            state.update({name: value for name, value in known.items() if state.get(name) is not value})


def _plain(value: Any) -> bool:
    """Whether it is an object with attributes of its own that is of no special kind."""
    return type(getattr(value, "__dict__", None)) is dict and not isinstance(
        value, torch.nn.Module | torch.Tensor | type | FunctionType
    )


def denoiser_work(denoiser: torch.nn.Module, inputs: Callable[..., Mapping[str, Any]], **size: Any) -> int | None:
    """The work of one call of a family's denoiser at that size, batch and number of frames and text tokens."""
    return work(denoiser, **inputs(denoiser, **size))
