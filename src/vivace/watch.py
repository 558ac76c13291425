"""Notices that a module is no longer what it was when its weights were rearranged or its kernels recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Changed(Exception):
    """A module is no longer what it was when something was made of it."""


class Watch:
    """A module as it is now: which modules, parameters, attention processors, adapters' strengths, storages and hooks.

    `changed` costs some tens of nanoseconds per parameter. That is cheaper to rely on than wrapping every method that
    casts, moves, loads, adapts or hooks: diffusers, peft and accelerate have some twenty, and people have their own.
    Without `storages` weights may move: nothing was made of them. With `vectors` those of one dimension must keep their
    values too: scales were made of norms.
    """

    def __init__(self, module: torch.nn.Module, *, storages: bool = True, vectors: bool = False) -> None:
        # The first of each is the module that it belongs to.
        self._versions: list[tuple[Any, torch.Tensor, int]] = []
        self._places: list[tuple[Any, dict[str, Any], str, Any]] = []
        self._storages: list[tuple[Any, Callable[[], int], int]] = []
        self._hooked: list[tuple[Any, dict[str, Any], Any, Any, int]] = []
        self._strengths: list[tuple[Any, list[Any], list[Any]]] = []  # of IP-Adapters, which change in place
        self._sparing: dict[tuple[int, ...], Watch] = {}
        for child in module.modules():
            own = [p for p in child._parameters.values() if p is not None]
            self._places += [(child, child._modules, name, inner) for name, inner in child._modules.items()]
            self._places += [(child, child._parameters, name, weight) for name, weight in child._parameters.items()]
            if "processor" in vars(child):
                self._places.append((child, vars(child), "processor", vars(child)["processor"]))
            if storages:
                self._storages += [(child, p.data_ptr, p.data_ptr()) for p in own]
            if vectors:
                self._versions += [(child, p, p._version) for p in own if p.ndim == 1 and not p.is_inference()]
            if isinstance(strengths := vars(child).get("scale"), list):
                self._strengths.append((child, strengths, list(strengths)))
            if child is not module:
                state = vars(child)
                hooks = (state["_forward_hooks"], state["_forward_pre_hooks"])
                self._hooked.append((child, state, *hooks, len(hooks[0]) + len(hooks[1]) + ("forward" in state)))

    def sparing(self, modules: Sequence[torch.nn.Module]) -> Watch:
        """The same without what lies inside `modules`; made once for each choice of them."""
        key = tuple(map(id, modules))
        if key not in self._sparing:
            inside = {id(child) for module in modules for child in module.modules()}
            rest = self._sparing[key] = copy.copy(self)
            for kind in ("_versions", "_places", "_storages", "_hooked", "_strengths"):
                setattr(rest, kind, [one for one in getattr(self, kind) if id(one[0]) not in inside])
        return self._sparing[key]

    def changed(self) -> bool:
        """Whether anything was replaced, moved, cast, hooked or unhooked since."""
        # Plain loops: generators would double the time of what runs at every call.
        for _, place, name, value in self._places:
            if place.get(name) is not value:
                return True
        for _, pointer, before in self._storages:
            if pointer() != before:
                return True
        for _, vector, version in self._versions:
            if vector._version != version:
                return True
        for _, strengths, before in self._strengths:
            if strengths != before:
                return True
        for _, state, after, first, before in self._hooked:
            if len(after) + len(first) + ("forward" in state) != before:
                return True
        return False


def hooked(module: torch.nn.Module) -> bool:
    """Whether a call of `module` does something besides its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or replaced(module)


def replaced(module: torch.nn.Module) -> bool:
    """Whether the instance holds another forward than its class's."""
    return "forward" in vars(module) and not holds_own_forward(module)


def holds_own_forward(module: torch.nn.Module) -> bool:
    """Whether the instance holds its class's own forward, as accelerate's hooks leave it behind."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is type(module).forward
