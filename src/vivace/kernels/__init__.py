"""Fused operations, one file each; importing this imports torch, and Triton where it is installed."""

from __future__ import annotations

from vivace.kernels import norm_modulate
from vivace.kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (norm_modulate.KERNEL,)}
