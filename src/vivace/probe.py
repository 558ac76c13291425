"""Runs Triton kernels in a process of their own: `python -m vivace.probe` prints one JSON check a line.

Apart from `vivace doctor`, since Triton reads TRITON_INTERPRET when it is imported, and since a compiler that crashes
should cost a line of the table and not the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import torch

from vivace.kernels import KERNELS
from vivace.kernels.kernel import Kernel
from vivace.kernels.language import ceil_div, jit, tl

# Whether a kernel works here at all; the tests hold each to its own, far smaller tolerance.
WITHIN = 2e-2


@jit
def _scale_kernel(x, out, scale, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < length) * scale, mask=at < length)


def _tiny(device: str) -> None:
    x = torch.arange(1000, dtype=torch.float32, device=device)
    out = torch.full_like(x, float("nan"))
    _scale_kernel[(ceil_div(len(x), 128),)](x, out, 2.0, len(x), BLOCK=128)
    _agree(out, x * 2)


def _cases(kernel: Kernel, device: str) -> None:
    for case in kernel.cases:
        expected = kernel.results(kernel.reference, kernel.arguments(case, device=device))
        got = kernel.results(kernel.launch, kernel.arguments(case, device=device))
        for out, exact in zip(got, expected, strict=True):
            _agree(out, exact)


def _agree(out: torch.Tensor, exact: torch.Tensor) -> None:
    # Results that an operation fills only in part are NaN elsewhere, in both.
    out, exact = out.double().nan_to_num(0.0), exact.double().nan_to_num(0.0)
    error = ((out - exact).norm() / exact.norm()).item()
    if not error <= WITHIN:
        raise ArithmeticError(f"the result is wrong: relative error {error:.3g}, allowed {WITHIN}")


def main() -> None:
    """Tries every kernel on the GPU, or on the CPU through the interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tries: dict[str, Callable[[str], None]] = {"a tiny kernel": _tiny}
    tries |= {name: partial(_cases, kernel) for name, kernel in KERNELS.items()}
    for name, attempt in tries.items():
        try:
            attempt(device)
            reason = ""
        except Exception as error:  # whatever a compiler raises is what the table has to say
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        sys.stdout.write(json.dumps({"name": name, "works": not reason, "detail": reason}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
