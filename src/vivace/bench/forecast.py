"""What a denoiser call will take on a GPU, from shapes alone: its kernels and bytes, counted on the "meta" device.

A forecast made before anything is measured says what to look for when it is: where stock and fused blocks differ in
launches and in passes over memory, and which time no fusion can take away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vivace.attention.backend import Backend
from vivace.attention.route import Route
from vivace.fused import fused_of
from vivace.kernels.rehearsal import without_values

if TYPE_CHECKING:
    from vivace.family import Family

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
ADDED = (torch.ops.aten.addmm_, torch.ops.aten._addmm_activation)
"""Products that torch's own count of operations leaves out: of the second and the third argument."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a GPU reaches at the shapes that these models use."""

    product: float = 780.0  # TFLOP/s of a 16-bit matrix product
    attention: float = 647.0
    copy: float = 3.8  # TB/s that a pass over memory reaches
    gap: float = 1.0  # microseconds between two kernels


H200 = Rates()
"""One H200, torch 2.11, bf16."""


@dataclass(kw_only=True)
class Forecast:
    """The kernels of one call: how many, and the milliseconds of each kind at some `Rates`."""

    rates: Rates = field(default_factory=Rates)
    launches: int = 0
    tflop: float = 0.0
    products: float = 0.0  # ms
    attention: float = 0.0  # ms
    passes: float = 0.0  # ms; everything that is neither
    gigabytes: float = 0.0  # of the passes

    @property
    def ms(self) -> float:
        return self.products + self.attention + self.passes + self.launches * self.rates.gap / 1e3

    def product(self, operations: float, nbytes: int) -> None:
        """One product: as long as its operations or its memory take, whichever is longer."""
        self.launches += 1
        self.tflop += operations / 1e12
        self.products += max(operations / self.rates.product, nbytes / self.rates.copy) / 1e9

    def a_pass(self, nbytes: int) -> None:
        """One pass over memory."""
        self.launches += 1
        self.gigabytes += nbytes / 1e9
        self.passes += nbytes / self.rates.copy / 1e9

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: Any = None, scale: Any = None):
        """An attention call, counted and not computed."""
        operations = 4 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.shape[3]
        self.launches += 1
        self.tflop += operations / 1e12
        self.attention += operations / self.rates.attention / 1e9
        return torch.empty_like(q)


class _Counting(TorchDispatchMode):
    """Counts every operation that starts a kernel: views and allocations do not."""

    def __init__(self, forecast: Forecast) -> None:
        super().__init__()
        self.forecast = forecast

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, made = ([t for t in tree_leaves(given) if isinstance(t, torch.Tensor)] for given in ((args, kwargs), out))
        storages = {t.untyped_storage()._cdata for t in read}
        writes = func._schema.is_mutable
        new = [t for t in made if t.untyped_storage()._cdata not in storages]
        if func.overloadpacket.__name__ in ALLOCATIONS or not (new or writes):
            return out
        nbytes = sum(t.numel() * t.element_size() for t in (*read, *new))
        if func.overloadpacket in ADDED:
            self.forecast.product(2 * args[1].numel() * args[2].shape[1], nbytes)
        elif func.overloadpacket in flop_registry:
            self.forecast.product(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out), nbytes)
        else:
            self.forecast.a_pass(nbytes)
        return out


@contextmanager
def _counted(forecast: Forecast) -> Iterator[None]:
    with torch.no_grad(), Route(Backend(name="native", attend=forecast.attend, masks=True)), _Counting(forecast):
        yield


def forecast(
    family: Family,
    *,
    variant: str | None = None,
    size: tuple[int, int] = (1024, 1024),
    batch: int = 1,
    text_tokens: int = 256,
    fused: bool = True,
    rates: Rates = H200,
) -> tuple[Forecast, Forecast]:
    """What the denoiser's stock blocks, or its fused ones, take: once per prompt, and at every step (bf16)."""
    denoiser = family.full(variant, device="meta", dtype=torch.bfloat16)
    stand_in = SimpleNamespace(config=denoiser.config, device=torch.device("cpu"), dtype=torch.bfloat16)
    kwargs = without_values(family.inputs(stand_in, size=size, batch=batch, frames=1, text_tokens=text_tokens, seed=0))
    once, step = Forecast(rates=rates), Forecast(rates=rates)
    with ExitStack() as undo:
        call: Any = denoiser
        blocks = fused_of(family) if fused else None
        if blocks is not None:
            call = blocks.fuse(denoiser, attend=once.attend, undo=undo)
            if call.once is not None:
                with _counted(once):
                    kwargs["once"] = call.prepare(kwargs)
            undo.close()
            call = blocks.fuse(denoiser, attend=step.attend, undo=undo)
        with _counted(step):
            call(**kwargs)
    return once, step
