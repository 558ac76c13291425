"""Notices that a module is no longer what it was when its weights were rearranged or its kernels recorded."""

from __future__ import annotations

from collections.abc import Callable
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
        own = [p for p in module.parameters() if vectors and p.ndim == 1 and not p.is_inference()]
        self._versions: list[tuple[torch.Tensor, int]] = [(vector, vector._version) for vector in own]
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._storages: list[tuple[Callable[[], int], int]] = []
        self._hooked: list[tuple[dict[str, Any], Any, Any, int]] = []
        self._strengths: list[tuple[list[Any], list[Any]]] = []  # of IP-Adapters, which change in place
        for child in module.modules():
            self._places += [(child._modules, name, inner) for name, inner in child._modules.items()]
            self._places += [(child._parameters, name, weight) for name, weight in child._parameters.items()]
            if "processor" in vars(child):
                self._places.append((vars(child), "processor", vars(child)["processor"]))
            if storages:
                self._storages += [(p.data_ptr, p.data_ptr()) for p in child._parameters.values() if p is not None]
            if isinstance(strengths := vars(child).get("scale"), list):
                self._strengths.append((strengths, list(strengths)))
            if child is not module:
                state = vars(child)
                hooks = (state["_forward_hooks"], state["_forward_pre_hooks"])
                self._hooked.append((state, *hooks, len(hooks[0]) + len(hooks[1]) + ("forward" in state)))

    def changed(self) -> bool:
        """Whether anything was replaced, moved, cast, hooked or unhooked since."""
        # Plain loops: generators would double the time of what runs at every call.
        for place, name, value in self._places:
            if place.get(name) is not value:
                return True
        for pointer, before in self._storages:
            if pointer() != before:
                return True
        for vector, version in self._versions:
            if vector._version != version:
                return True
        for strengths, before in self._strengths:
            if strengths != before:
                return True
        for state, after, first, before in self._hooked:
            if len(after) + len(first) + ("forward" in state) != before:
                return True
        return False


def hooked(module: torch.nn.Module) -> bool:
    """Whether a call of `module` does something besides its class's forward."""
    return _hooked(vars(module))


def _hooked(state: dict[str, Any]) -> bool:
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
