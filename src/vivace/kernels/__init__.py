"""Fused operations, one file each; importing this imports torch, and Triton where it is installed."""

from __future__ import annotations

from vivace.kernels import (
    activate,
    blend,
    change,
    channel_norm_silu,
    cross_attention,
    few_rows_linear,
    gate_residual,
    glu,
    group_norm_silu,
    int8_linear,
    join_activate,
    merge_heads,
    norm_modulate,
    qk_norm_rope,
    quant_heads,
    quant_rows,
    residual_norm,
    unpack_rows,
    unscale_heads,
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
        join_activate,
        glu,
        blend,
        group_norm_silu,
        channel_norm_silu,
        quant_rows,
        unpack_rows,
        int8_linear,
        few_rows_linear,
        quant_heads,
        unscale_heads,
        cross_attention,
        merge_heads,
        change,
    )
}
