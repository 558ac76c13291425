"""A scheduler that knows its timesteps on the host: no step waits for the device to learn which step it is.

Pipelines loop over `scheduler.timesteps`, a tensor on the device, and hand its elements back to the scheduler. To look
one up (`(timesteps == t).nonzero()`), or to read the noise level at it (`alphas_cumprod[t]`), stock schedulers wait
until the device has done everything it was given. But an element says by its address which one it is, and the same
value from a copy on the host makes all of that arithmetic of the host's own, with the same result.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


class Times:
    """The timesteps of one scheduler, on its device and on the host."""

    def __init__(self, timesteps: torch.Tensor) -> None:
        self.timesteps = timesteps
        on_device = timesteps.device.type == "cuda"
        self._host = torch.empty_like(timesteps, device="cpu", pin_memory=on_device)
        # Waited for in the first step, when what was before the loop is long on its way.
        self._host.copy_(timesteps, non_blocking=on_device)
        self._copied = torch.cuda.Event() if on_device else None
        if self._copied is not None:
            self._copied.record()

    @property
    def host(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._host

    def find(self, timestep: Any) -> torch.Tensor | None:
        """The host's copy of an element of the timesteps, by its place in memory; None for anything else."""
        mine = self.timesteps
        if not isinstance(timestep, torch.Tensor) or timestep.ndim or timestep.dtype != mine.dtype:
            return None
        if timestep.device != mine.device or timestep.data_ptr() < mine.data_ptr():
            return None
        index, rest = divmod(timestep.data_ptr() - mine.data_ptr(), mine.itemsize)
        return self.host[index] if rest == 0 and index < len(mine) else None


def keeping_times(stock: Any) -> dict[str, Any]:
    """Members of a one-off class of the scheduler class `stock`, for one scheduler: it takes its timesteps from the
    host wherever it is handed one of them."""
    if not hasattr(stock, "set_timesteps"):
        return {}
    known: list[Times] = []

    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock.set_timesteps(self, *args, **kwargs)
        known[:] = [Times(self.timesteps)] if _listed(self.timesteps) else []
        return result

    takers = [name for name in ("step", "scale_model_input") if _takes(stock, name)]
    return {"set_timesteps": set_timesteps, **{name: _taking(getattr(stock, name), known) for name in takers}}


def _listed(timesteps: Any) -> bool:
    return isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 and timesteps.is_contiguous()


def _takes(stock: type, name: str) -> bool:
    method = getattr(stock, name, None)
    return method is not None and "timestep" in inspect.signature(method).parameters


def _taking(stock: Callable[..., Any], known: list[Times]) -> Callable[..., Any]:
    """A method that takes a timestep, given the host's copy of it while the scheduler reads its timesteps there."""
    place = list(inspect.signature(stock).parameters).index("timestep")

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["timestep"] if "timestep" in kwargs else args[place - 1] if len(args) >= place else None
        times = known[0] if known and known[0].timesteps is self.timesteps else None
        found = times.find(given) if times is not None else None
        if times is None or found is None:
            return stock(self, *args, **kwargs)
        if "timestep" in kwargs:
            kwargs["timestep"] = found
        else:
            args = (*args[: place - 1], found, *args[place:])
        self.timesteps = times.host
        try:
            return stock(self, *args, **kwargs)
        finally:
            self.timesteps = times.timesteps

    return method
