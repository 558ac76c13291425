"""Triton where it is installed, and the one decision that follows from it: who runs an operation on the CPU.

The CPU wheel of torch brings no Triton. Without it every operation still has its torch reference; only launching a
kernel on a GPU is an error. With TRITON_INTERPRET=1 set before Triton is first imported, CPU tensors go through the
kernels themselves, which is how they are tested without a GPU.
"""

from __future__ import annotations

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


def jit(function: Any = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """`triton.jit`; sizes that follow the resolution go in `do_not_specialize`, so that a new one compiles nothing."""
    if function is None:
        return lambda function: jit(function, do_not_specialize=do_not_specialize)
    if triton is None:
        return _Absent(function.__name__)
    return triton.jit(do_not_specialize=list(do_not_specialize))(function)


INTERPRETED: bool = knobs is not None and bool(knobs.runtime.interpret)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)
