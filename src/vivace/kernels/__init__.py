"""Fused operations, one file each; importing this imports torch, and Triton where it is installed."""

from __future__ import annotations

from vivace.kernels import (
    activate,
    change,
    gate_residual,
    geglu,
    group_norm_silu,
    int8_linear,
    norm_modulate,
    qk_norm_rope,
    quant_rows,
    residual_norm,
    unpack_rows,
)
from vivace.kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL
    for module in (
        norm_modulate,
        gate_residual,
        residual_norm,
        qk_norm_rope,
        activate,
        geglu,
        group_norm_silu,
        quant_rows,
        unpack_rows,
        int8_linear,
        change,
    )
}
