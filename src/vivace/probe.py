"""Runs Triton kernels in a process of their own: `python -m vivace.probe` prints one JSON check a line.

Apart from `vivace doctor`, since Triton reads TRITON_INTERPRET when it is imported, and since a compiler that crashes
should cost a line of the table and not the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _scale_kernel(x, out, scale, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < length) * scale, mask=at < length)


def scale(x: torch.Tensor, *, by: float) -> torch.Tensor:
    """x * by, through the smallest kernel there is; x is contiguous fp32 of any shape."""
    out = torch.full_like(x, float("nan"))
    _scale_kernel[(triton.cdiv(x.numel(), 128),)](x, out, by, x.numel(), BLOCK=128)
    return out


def _scale_agrees(device: str) -> None:
    x = torch.arange(1000, dtype=torch.float32, device=device)
    torch.testing.assert_close(scale(x, by=2.0), x * 2)


def main() -> None:
    """Tries every kernel on the GPU, or on the CPU through the interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels: dict[str, Callable[[str], None]] = {"a tiny kernel": _scale_agrees}
    for name, agrees in kernels.items():
        try:
            agrees(device)
            reason = ""
        except Exception as error:  # whatever a compiler raises is what the table has to say
            reason = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps({"name": name, "works": not reason, "detail": reason}) + "\n")


if __name__ == "__main__":
    main()
