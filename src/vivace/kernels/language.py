"""Triton where it is installed, and the one decision that follows from it: who runs an operation on the CPU.

The CPU wheel of torch brings no Triton. Without it every operation still has its torch reference; only launching a
kernel on a GPU is an error. With TRITON_INTERPRET=1 set before Triton is first imported, CPU tensors go through the
kernels themselves, which is how they are tested without a GPU.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ModuleNotFoundError:
    triton = tl = knobs = None


class _Absent:
    """Stands where a kernel would be; says what is missing when it is launched."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"{self.name} is a Triton kernel and Triton is not installed; pip install triton")


INTERPRETED: bool = knobs is not None and bool(knobs.runtime.interpret)
EMULATED = tl.constexpr(INTERPRETED) if tl else INTERPRETED
"""`INTERPRETED`, as kernels read it: there are no instructions of a GPU's own there."""

COMPILE_ONLY: ContextVar[bool] = ContextVar("vivace_compile_only", default=False)
"""While true, launching a kernel compiles it and runs nothing; its tensors may be "meta" ones."""

if triton is not None and not INTERPRETED:

    class _Jitted(triton.JITFunction):
        """A function in Triton that heeds `COMPILE_ONLY` when it is launched."""

        def create_binder(self) -> Any:
            bound = super().create_binder()
            self.compile = _compile
            return bound

        def run(self, *arguments: Any, warmup: bool, **options: Any) -> Any:
            return super().run(*arguments, warmup=warmup or COMPILE_ONLY.get(), **options)


def _compile(*arguments: Any, **options: Any) -> Any:
    """Triton's compilation, and that of what launches the kernel, in the same thread.

    Triton up to 3.6 builds a C module for the latter when it first launches: a quarter of a second, one by one.
    """
    assert triton is not None
    kernel = triton.compile(*arguments, **options)
    driver: Any = triton.runtime.driver.active
    driver.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def jit(function: Any = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, for kernels and for what they call.

    Sizes that follow the resolution go in `do_not_specialize`, so that a new one compiles nothing.
    """
    if function is None:
        return lambda function: jit(function, do_not_specialize=do_not_specialize)
    if triton is None:
        return _Absent(function.__name__)
    if INTERPRETED:
        return triton.jit(do_not_specialize=list(do_not_specialize))(function)
    return _Jitted(function, do_not_specialize=list(do_not_specialize))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)
