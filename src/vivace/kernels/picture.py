"""What the kernels of pictures share: tiles in either order of pixels, the moments of channels, and a norm's work.

A picture may come in two parts, a sum or channels side by side, and is joined where it is read.
"""

from __future__ import annotations

import torch

from vivace.kernels.activate import activation
from vivace.kernels.language import EMULATED, jit, tl


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The layout of `x` that the result keeps. A single pixel is in both: then the channels are last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


@jit
def place(first, channel, in_channels, channels, pixels, plane, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Offsets and mask of a [P, C] tile from pixel `first` on."""
    pixel = (first + tl.arange(0, PIXELS)).to(tl.int64)[:, None]
    if LAST:
        return pixel * channels + channel[None, :], (pixel < pixels) & in_channels[None, :]
    # `plane` equals `pixels`, but is specialised on being a multiple of 16: here it is what makes accesses wide.
    return channel.to(tl.int64)[None, :] * plane + pixel, (pixel < plane) & in_channels[None, :]


@jit
def rounded(v, kind: tl.constexpr):
    """`v` (fp32) as it will be read when it has been stored as `kind`; the interpreter's cast to bf16 cuts it off."""
    if EMULATED and kind == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return v.to(kind).to(tl.float32)


@jit
def joined(
    x, y, y_bias, after, skip, first, channel, inside, own, channels, pixels, plane,
    LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A [P, C] tile to be normalised, as it is stored: `x` (of `own` channels) and `skip`, or `x + y`; 0 elsewhere."""
    within = inside if skip is None else inside & (channel < own)
    at, mask = place(first, channel, within, own, pixels, plane, LAST, PIXELS)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if skip is not None:
        at, mask = place(first, channel - own, inside & (channel >= own), channels - own, pixels, plane, LAST, PIXELS)
        v += tl.load(skip + at, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        v += tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if y_bias is not None:
            v += tl.load(y_bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        if after is not None:
            v += tl.load(after + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        v = tl.where(mask, rounded(v, x.dtype.element_ty), 0.0)
    return v


@jit
def moments(
    x, y, y_bias, after, skip, h, first, tiles, channel, in_channels, own, channels, pixels, plane,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of each channel [C] over `tiles` tiles of pixels, the last perhaps partial.

    What was joined for them is left in `h`.
    """
    seen = tl.zeros((CHANNELS,), tl.float32)
    mean = tl.zeros((CHANNELS,), tl.float32)
    spread = tl.zeros((CHANNELS,), tl.float32)
    for i in range(tiles):
        start = first + i * PIXELS
        at, mask = place(start, channel, in_channels, channels, pixels, plane, LAST, PIXELS)
        v = joined(
            x, y, y_bias, after, skip, start, channel, in_channels, own, channels, pixels, plane, LAST, PIXELS
        )  # fmt: skip
        if h is not None:
            tl.store(h + at, v.to(h.dtype.element_ty), mask=mask)
        n = tl.minimum(pixels - start, PIXELS).to(tl.float32)
        here = tl.sum(v, 0) / n
        away = tl.where(mask, v - here[None, :], 0.0)
        step = here - mean
        mean += step * (n / (seen + n))
        spread += tl.sum(away * away, 0) + step * step * (seen * n / (seen + n))
        seen += n
    return mean, spread


@jit
def added(add, after, channel, mask):
    """What the norm adds to each channel: `add`, and less of what is there for later."""
    added = tl.zeros(channel.shape, tl.float32)
    if add is not None:
        added += tl.load(add + channel, mask=mask, other=0.0).to(tl.float32)
    if after is not None:
        added -= tl.load(after + channel, mask=mask, other=0.0).to(tl.float32)
    return added


@jit
def coefficients(mean, variance, channel, mask, weight, bias, added, eps):
    """The scale and shift of each channel that normalise it."""
    scale = tl.rsqrt(variance + eps) * tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32) + (added - mean) * scale
    return scale, shift


@jit
def apply(v, out, scale, shift, at, mask, SILU: tl.constexpr):
    y = v * scale[None, :] + shift[None, :]
    if SILU:
        y = activation(y, "silu", False)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
