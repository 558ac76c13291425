"""Pass: matrix products that add up in 16 bit, which GeForce cards do at twice the rate. Not exact."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vivace.passes.target import Pass, Target

_SETTING = threading.Lock()
_inside = 0


@contextmanager
def narrow() -> Iterator[None]:
    """Products in 16 bit add up in 16 bit. The switch is the process's: it goes back when the last call has ended."""
    global _inside
    matmul = torch.backends.cuda.matmul
    with _SETTING:
        before = _inside == 0 and matmul.allow_fp16_accumulation
        _inside += 1
        matmul.allow_fp16_accumulation = True
    try:
        yield
    finally:
        with _SETTING:
            _inside -= 1
            if _inside == 0:
                matmul.allow_fp16_accumulation = before


def _check(target: Target) -> str | None:
    if target.device.type != "cuda":
        return f"it is a choice of CUDA's matrix products, and the denoiser is on {target.device.type}"
    if target.dtype != torch.float16:
        number = str(target.dtype).removeprefix("torch.")
        return (
            f"only products in float16 add up in 16 bit, and the denoiser is in {number}; load it with dtype='float16'"
        )
    return None


def _apply(target: Target) -> None:
    for lane in target.lanes.values():
        lane.narrow = True
    target.done("accumulate", _forecast(target))


def _forecast(target: Target) -> str:
    return "products in float16 add up in 16 bit (not exact; sums beyond 65504 overflow)"


ACCUMULATE = Pass(
    name="accumulate",
    why_here="anywhere before graphs, which record the kernels that it chooses",
    wants=lambda config: "on" if config.accumulate == "fp16" else "off",
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
