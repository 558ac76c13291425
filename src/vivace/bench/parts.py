"""Where a pipeline's seconds go: text encoders, denoiser, autoencoder, and what lies between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from vivace.bench.clock import synchronize, wall


def parts_of(call: Callable[[], Any], pipe: Any) -> Mapping[str, Mapping[str, float]]:
    """One call more, in which the device is waited for around each component: its seconds and share, by name.

    "between" is the rest: scheduler, guidance, pictures to bytes, the host.
    """
    device, spent = torch.device(pipe.device), {}
    with ExitStack() as stack:
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                for method in _methods(part):
                    stack.enter_context(_timed(part, method, device, spent, name))
        whole, _ = wall(call, device)
    spent["between"] = whole - sum(spent.values())
    return {name: {"seconds": round(s, 5), "share": round(s / whole, 4)} for name, s in spent.items()}


def _methods(part: torch.nn.Module) -> tuple[str, ...]:
    """The names of what a pipeline calls of a component; of a compiled one the way in that is not traced itself."""
    if hasattr(part, "decode"):
        return "encode", "decode"
    return ("forward",) if part._compiled_call_impl is None else ("_compiled_call_impl",)


@contextmanager
def _timed(part: Any, method: str, device: torch.device, spent: dict[str, float], name: str) -> Iterator[None]:
    """`spent[name]` grows by what every call of the method takes."""
    before, run = vars(part).get(method), getattr(part, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        began = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            synchronize(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

    setattr(part, method, timed)
    try:
        yield
    finally:
        if before is None:
            delattr(part, method)
        else:
            setattr(part, method, before)
