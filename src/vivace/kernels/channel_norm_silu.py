"""RMSNorm over the channels of each pixel, with the SiLU that follows: the norm of causal video autoencoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.activate import activation
from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, power_of_two, tl
from vivace.kernels.picture import layout_of, place

SCHEMA = "channel_norm_silu(Tensor x, Tensor weight, float eps, bool silu) -> Tensor[]"
_ELEMENTS = 8192  # of a tile


def channel_norm_silu_ref(x: torch.Tensor, weight: torch.Tensor, eps: float, silu: bool) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    y = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps)
    y = y * weight.float()[(..., *[None] * (x.ndim - 2))]
    return [(F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=layout_of(x))]


@jit(do_not_specialize=("pixels",))
def _channel_norm_silu_kernel(
    x, out, weight, pixels, plane, channels, sample, eps,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    at, mask = place(tl.program_id(0) * PIXELS, channel, inside, channels, pixels, plane, LAST, PIXELS)
    v = tl.load(x + batch * sample + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 1) / channels + eps)
    y = v * scale[:, None] * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = activation(y, "silu", False)
    tl.store(out + batch * sample + at, y.to(out.dtype.element_ty), mask=mask)


def _launch(x: torch.Tensor, weight: torch.Tensor, eps: float, silu: bool) -> list[torch.Tensor]:
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x)
    batch, channels = x.shape[:2]
    pixels, last, block = x[0, 0].numel(), layout != torch.contiguous_format, power_of_two(channels)
    tile = max(16, _ELEMENTS // block)
    _channel_norm_silu_kernel[(ceil_div(pixels, tile), batch)](
        x, out, weight, pixels, 16 if last else pixels, channels, channels * pixels, eps,
        SILU=silu, LAST=last, PIXELS=tile, CHANNELS=block, num_warps=8,
    )  # fmt: skip
    return [out]


_op = register(SCHEMA, reference=channel_norm_silu_ref, launch=_launch)


def channel_norm_silu(x: torch.Tensor, *, weight: torch.Tensor, eps: float = 1e-12, silu: bool = True) -> torch.Tensor:
    """`silu(rms_norm(x) * weight)` for `x` [B, C, ...], normed over C, and `weight` [C]; x's layout is kept.

    Raises ValueError when the weight does not fit.
    """
    if weight.shape != x.shape[1:2] or weight.stride(0) != 1:
        raise ValueError(f"weight must be [{x.shape[1]}] and contiguous for x of {list(x.shape)}")
    return _op(x, weight, eps, silu)[0]


def _make(
    draw: Draw, *, batch: int = 1, channels: int, size: tuple[int, ...], last: bool = False, silu: bool = True
) -> dict[str, Any]:
    x = draw(batch, *size, channels) if last else draw(batch, channels, *size)
    return {"x": x.movedim(-1, 1) if last else x, "weight": draw(channels), "eps": 1e-12, "silu": silu}


KERNEL = Kernel(
    name="channel_norm_silu",
    reference=channel_norm_silu_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("frames", {"batch": 2, "channels": 96, "size": (3, 7, 5)}),
        Case("frames, channels last", {"batch": 2, "channels": 96, "size": (3, 7, 5), "last": True}),
        Case("pictures, without the SiLU", {"channels": 80, "size": (9, 6), "silu": False}),
        Case("one pixel", {"channels": 12, "size": (1, 1, 1)}),
    ),
    bench=(
        Case("Wan VAE 96 4x480x832, channels last", {"channels": 96, "size": (4, 480, 832), "last": True}),
        Case("Wan VAE 96 4x480x832", {"channels": 96, "size": (4, 480, 832)}),
        Case("Wan VAE 384 2x120x208", {"channels": 384, "size": (2, 120, 208)}),
        Case("Qwen-Image VAE 96 1x1328²", {"channels": 96, "size": (1, 1328, 1328)}),
    ),
)
