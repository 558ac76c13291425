"""The `Kernel` value: one fused operation with its torch reference, its test cases and its bench cases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vivace.kernels.language import COMPILE_ONLY, INTERPRETED

_LIBRARY = torch.library.Library("vivace", "FRAGMENT")
_INTERPRETER = threading.Lock()


class Draw:
    """Seeded random inputs. On the "meta" device only shapes, to count bytes without holding any."""

    def __init__(self, *, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, pad: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal values of `shape`; with `pad`, a view into rows `pad` elements wider, starting `pad` // 2 in."""
        wide = (*shape[:-1], shape[-1] + pad)
        x = torch.randn(wide, generator=self._generator, device=self.device).to(dtype or self.dtype)
        return x[..., pad // 2 : pad // 2 + shape[-1]]

    def empty(self, *shape: int) -> torch.Tensor:
        """For a kernel to fill: NaN, so that a row which is never written cannot pass for right."""
        return torch.full(shape, float("nan"), device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Case:
    """One set of sizes and options, as keywords of the kernel's `make`."""

    name: str
    sizes: Mapping[str, Any]


# A fused result is rounded once, from fp32: it may differ from the reference by the last bit of its type.
ONE_ROUNDING: Mapping[torch.dtype, tuple[float, float]] = {
    torch.bfloat16: (2**-7, 1e-5),
    torch.float16: (2**-10, 1e-5),
    torch.float32: (2e-5, 2e-5),
}


def read_and_write_once(arguments: Mapping[str, Any], results: list[torch.Tensor]) -> int:
    """Bytes of every tensor argument and every result."""
    tensors = [*(a for a in arguments.values() if isinstance(a, torch.Tensor)), *results]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One fused operation, in three forms that take the same arguments and return the list of tensors they made.

    An operation that fills its arguments returns nothing and names them in `written`.
    """

    name: str
    reference: Callable[..., Any]  # torch, fp32 maths
    launch: Callable[..., Any]  # Triton
    op: Callable[..., Any]  # torch.ops.vivace.<name>: what models call
    make: Callable[..., dict[str, Any]]  # make(draw, **case.sizes) -> arguments
    cases: tuple[Case, ...]  # small and odd, for the tests
    bench: tuple[Case, ...]  # the shapes that models use
    # Relative and absolute, for each type of a result.
    tolerance: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=lambda: ONE_ROUNDING)
    written: tuple[str, ...] = ()  # arguments that the operation fills
    since: int = 75  # compute capability, times ten, from which Triton compiles it
    bytes_moved: Callable[[Mapping[str, Any], list[torch.Tensor]], int] = read_and_write_once

    def arguments(
        self, case: Case, *, device: str | torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> dict[str, Any]:
        """Fresh arguments of a case; the same values for the same seed and device type."""
        return self.make(Draw(device=device, dtype=dtype, seed=seed), **case.sizes)

    def bound_bytes(self, case: Case, *, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that must cross device memory for a case: divided by the copy bandwidth, the least time it can take."""
        arguments = self.arguments(case, device="meta", dtype=dtype)
        return self.bytes_moved(arguments, self.results(self.reference, arguments))

    def results(self, run: Callable[..., Any], arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        """What `run` (the reference, the launch or the op) makes or fills, as a list."""
        made = run(**arguments)
        return [arguments[name] for name in self.written if arguments[name] is not None] if self.written else list(made)


def register(schema: str, *, reference: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `torch.ops.vivace.<name>` from a torch.library schema, "name(Tensor x, ...) -> Tensor[]".

    Triton runs it on GPUs; the reference runs it on CPUs, and gives the shapes to torch.compile.
    The dispatcher is used bare, without `custom_op`'s checks: small models call these ops thousands of times a second.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _on_device(launch), "CUDA")
    _LIBRARY.impl(name, _one_at_a_time(launch) if INTERPRETED else reference, "CPU")
    torch.library.register_fake(f"vivace::{name}", _without_values(reference, launch), lib=_LIBRARY)
    return getattr(torch.ops.vivace, name).default


def _without_values(reference: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    """For tensors that have only shapes: the reference, unless its kernel is to be compiled for them."""
    return lambda *arguments: (launch if COMPILE_ONLY.get() else reference)(*arguments)


def _one_at_a_time(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter patches the language for the time of a launch, for every thread of the process."""

    def launch_alone(*arguments: Any, **named: Any) -> Any:
        with _INTERPRETER:
            return launch(*arguments, **named)

    return launch_alone


def _on_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; makes that the device of the first argument."""

    def launch_there(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if x.get_device() == torch.cuda.current_device():
            return launch(x, *rest, **named)
        with torch.cuda.device(x.device):
            return launch(x, *rest, **named)

    return launch_there
