"""A pipeline as one request sees it: its own scheduler and progress, and modules whose calls go to the worker."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vivace import request
from vivace.one_off import stock_class

Send = Callable[[torch.nn.Module, str, dict[str, Any]], Any]
"""Has one method of a module called with these arguments, and returns what it returned."""

METHODS = ("decode", "encode")
"""What pipelines call on a module besides itself."""


class Remote:
    """Stands for a module in a view: everything is the module's own, but its calls are sent.

    `told` are entries of its configuration that this pipeline is told otherwise.
    """

    def __init__(self, module: torch.nn.Module, send: Send, told: Mapping[str, Any]) -> None:
        vars(self).update(_module=module, _send=send, _told=told)

    @property
    def vivace_behind(self) -> torch.nn.Module:
        return vars(self)["_module"]

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Pipelines ask isinstance(module, ...), and take the class's name for messages.
        return type(vars(self)["_module"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("forward", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_module"], name)
        if name in METHODS:
            return lambda *args, **kwargs: self._method(name, args, kwargs)
        told = vars(self)["_told"]
        return type(value)({**value, **told}) if name == "config" and told else value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} belongs to every request; it cannot be set by one")

    def to(self, *args: Any, **kwargs: Any) -> Remote:
        """Stays where it is and as it is: other requests use it too."""
        return self

    @contextmanager
    def cache_context(self, name: str, **facts: Any) -> Iterator[None]:
        """Note the guidance branch of the calls inside; the module's own context is not entered, others are in it."""
        now = request.current()
        before = now.branch if now else None
        if now:
            now.branch = name
        try:
            yield
        finally:
            if now:
                now.branch = before

    def _method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, send = vars(self)["_module"], vars(self)["_send"]
        names = _names(type(module), name)
        return send(module, name, {**dict(zip(names, args, strict=False)), **kwargs})


# Weak: an accelerated module has a class of its own, which holds on to the module.
_SIGNATURES: WeakKeyDictionary[type, dict[str, tuple[str, ...]]] = WeakKeyDictionary()


def _names(module_class: type, method: str) -> tuple[str, ...]:
    known = _SIGNATURES.setdefault(module_class, {})
    if method not in known:
        known[method] = tuple(inspect.signature(getattr(module_class, method)).parameters)[1:]
    return known[method]


class Guarded:
    """Stands for a tokenizer in a view: one request at a time (a fast tokenizer refuses two: "Already borrowed")."""

    def __init__(self, subject: Any, lock: threading.RLock) -> None:
        self._subject, self._lock = subject, lock

    @property
    def vivace_behind(self) -> Any:
        return self._subject

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(vars(self)["_subject"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._subject(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_subject"], name)
        if not callable(value):
            return value

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return value(*args, **kwargs)

        return locked


def view(
    pipe: Any,
    *,
    send: Send,
    lock: threading.RLock,
    device: torch.device,
    remembers: bool = False,
    told: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Any:
    """A pipeline like `pipe` with the same weights and nothing else in common that a call changes.

    `lock` keeps the requests apart that share its tokenizers. What it gives its modules is on `device`. With
    `remembers` it takes the embeddings of prompts that an accelerated `pipe` has kept. `told` has entries of
    components' configurations that the pipeline is told otherwise.
    """
    stock, parts = stock_class(type(pipe)), pipe.components
    mine = object.__new__(_viewing(stock))
    vars(mine).update(vars(pipe), vivace_parts=tuple(parts), vivace_device=device)
    vars(mine)["vivace_encode"] = getattr(type(pipe) if remembers else stock, "encode_prompt", None)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            vars(mine)[name] = Remote(part, send, told.get(name, {}))
        elif hasattr(part, "set_timesteps"):
            vars(mine)[name] = _fresh(part)
        elif hasattr(part, "encode") and hasattr(part, "decode"):
            vars(mine)[name] = Guarded(part, lock)
    return mine


def _fresh(scheduler: Any) -> Any:
    """Another of its kind with the very configuration.

    A pipeline may have set what nobody gave the scheduler (Stable Diffusion's `steps_offset`, say); the list of what
    nobody gave would have `from_config` take the defaults for these.
    """
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return stock_class(type(scheduler)).from_config(config)


@functools.cache
def _viewing(stock: Any) -> type:
    """The class of a stock class's views: what the views know is not looked for, which takes milliseconds a picture.

    It must not know of any model: it is kept for good.
    """

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["vivace_encode"](self, *args, **kwargs)

    nothing = lambda self, *args, **kwargs: None  # noqa: E731
    device = property(lambda self: vars(self)["vivace_device"])
    members: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "components": property(lambda self: {name: getattr(self, name) for name in vars(self)["vivace_parts"]}),
        "_execution_device": device,
        "device": device,
        # The hooks belong to the shared modules, and so does the VAE's type.
        "maybe_free_model_hooks": nothing,
        "upcast_vae": nothing,
    }
    if hasattr(stock, "encode_prompt"):
        members["encode_prompt"] = functools.wraps(stock.encode_prompt)(encode_prompt)
    return type(stock)(stock.__name__, (stock,), members)
