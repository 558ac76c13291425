"""How fast a GPU was measured to multiply and to copy: what a benchmark's share of the roofline refers to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The best rates seen with torch 2.11 on random data; the datasheets' are higher and no program's."""

    bf16: float  # TFLOP/s of an 8192^3 product or of FLUX's widest GEMM, whichever is faster
    fp8: float | None  # TFLOP/s, row scales and fast accumulation
    int8: float | None
    copy: float  # TB/s from device memory to device memory, bytes read and written


RATES: Mapping[str, Rates] = {
    "NVIDIA H200": Rates(bf16=802, fp8=1500, int8=956, copy=4.3),
    "NVIDIA H100 80GB HBM3": Rates(bf16=798, fp8=None, int8=None, copy=3.0),
}
"""By the name that torch gives the GPU; a GPU without a row has no share of the roofline in its tables."""


FASTEST = max(RATES, key=lambda gpu: RATES[gpu].bf16)


def rate_of(gpu: str | None, kind: str) -> float | None:
    """TFLOP/s of `kind` ("bf16", "fp8", "int8") on that GPU, or None where it was not measured."""
    return getattr(RATES.get(gpu or ""), kind, None)
