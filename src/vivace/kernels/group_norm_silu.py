"""GroupNorm, with the SiLU that follows and the per-channel time embedding that comes before, channels last or first.

A small group is one program's work. A large one takes three launches: moments of each channel over chunks of pixels,
their sum into one scale and shift a channel, and the pass that applies them. Moments are merged as means and squared
deviations (Chan, Golub and LeVeque 1979), never as sums of squares, so a mean far from zero costs no precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.activate import activation
from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, power_of_two, tl

SCHEMA = (
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? add, int groups, float eps, bool silu) -> Tensor[]"
)
_WHOLE = 16384  # elements of a group up to which one program is quicker than three launches
_CHUNKS = 512  # of pixels, at most: what the second launch has to sum for each channel


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The layout of `x` that the result keeps. A single pixel is in both: then the channels are last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def group_norm_silu_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    over_pixels = (..., *[None] * (x.ndim - 2))
    y = x.float().contiguous() if add is None else x.float().contiguous() + add.float()[over_pixels]
    y = y.unflatten(1, (groups, -1)).flatten(2)
    y = y - y.mean(2, keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(2, keepdim=True) + eps)).view(x.shape)
    y = y * weight.float()[over_pixels] + bias.float()[over_pixels]
    return [(F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=layout_of(x))]


@jit
def place(first, channel, in_channels, channels, pixels, plane, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Offsets and mask of a [P, C] tile from pixel `first` on."""
    pixel = (first + tl.arange(0, PIXELS)).to(tl.int64)[:, None]
    if LAST:
        return pixel * channels + channel[None, :], (pixel < pixels) & in_channels[None, :]
    # `plane` equals `pixels`, but is specialised on being a multiple of 16: here it is what makes accesses wide.
    return channel.to(tl.int64)[None, :] * plane + pixel, (pixel < plane) & in_channels[None, :]


@jit
def _moments(
    x, first, tiles, channel, in_channels, channels, pixels, plane,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of each channel [C] over `tiles` tiles of pixels, the last perhaps partial."""
    seen = tl.zeros((CHANNELS,), tl.float32)
    mean = tl.zeros((CHANNELS,), tl.float32)
    spread = tl.zeros((CHANNELS,), tl.float32)
    for i in range(tiles):
        start = first + i * PIXELS
        at, mask = place(start, channel, in_channels, channels, pixels, plane, LAST, PIXELS)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        n = tl.minimum(pixels - start, PIXELS).to(tl.float32)
        here = tl.sum(v, 0) / n
        away = tl.where(mask, v - here[None, :], 0.0)
        step = here - mean
        mean += step * (n / (seen + n))
        spread += tl.sum(away * away, 0) + step * step * (seen * n / (seen + n))
        seen += n
    return mean, spread


@jit
def _coefficients(mean, variance, channel, mask, weight, bias, add, eps):
    """The scale and shift of each channel that normalise it."""
    scale = tl.rsqrt(variance + eps) * tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32) - mean * scale
    if add is not None:
        shift += tl.load(add + channel, mask=mask, other=0.0).to(tl.float32) * scale
    return scale, shift


@jit
def _apply(
    x, out, scale, shift, first, channel, in_channels, channels, pixels, plane,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    at, mask = place(first, channel, in_channels, channels, pixels, plane, LAST, PIXELS)
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        y = activation(y, "silu", False)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=("pixels",))
def _whole_kernel(
    x, out, weight, bias, add, pixels, plane, channels, sample, add_batch, eps,
    GROUP: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, CHANNELS) < GROUP
    channel = tl.program_id(0) * GROUP + tl.arange(0, CHANNELS)
    x += batch * sample
    out += batch * sample
    tiles = tl.cdiv(pixels, PIXELS)
    mean, spread = _moments(x, 0, tiles, channel, inside, channels, pixels, plane, LAST, PIXELS, CHANNELS)
    if add is not None:
        add += batch * add_batch
        mean += tl.load(add + channel, mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(mean, 0) / GROUP
    away = tl.where(inside, mean - centre, 0.0)
    variance = tl.sum(spread / pixels + away * away, 0) / GROUP
    scale, shift = _coefficients(centre, variance, channel, inside, weight, bias, add, eps)
    for i in range(tiles):
        _apply(x, out, scale, shift, i * PIXELS, channel, inside, channels, pixels, plane, SILU, LAST, PIXELS)


@jit(do_not_specialize=("pixels", "tiles", "chunks"))
def _moments_kernel(
    x, means, spreads, pixels, tiles, chunks, plane, channels, sample,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += batch * sample
    first = chunk * tiles * PIXELS
    tiles = tl.minimum(tiles, tl.cdiv(pixels - first, PIXELS))
    mean, spread = _moments(x, first, tiles, channel, inside, channels, pixels, plane, LAST, PIXELS, CHANNELS)
    at = (batch * chunks + chunk) * channels + channel
    tl.store(means + at, mean, mask=inside)
    tl.store(spreads + at, spread, mask=inside)


@jit(do_not_specialize=("pixels", "span", "chunks"))
def _coefficients_kernel(
    means, spreads, scales, shifts, weight, bias, add, pixels, span, chunks, channels, add_batch, eps,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, CHANNELS) < GROUP
    channel = tl.program_id(0) * GROUP + tl.arange(0, CHANNELS)
    means += batch * chunks * channels
    spreads += batch * chunks * channels
    added = tl.zeros((CHANNELS,), tl.float32)
    if add is not None:
        add += batch * add_batch
        added += tl.load(add + channel, mask=inside, other=0.0).to(tl.float32)

    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(tl.cdiv(chunks, ROWS)):
        chunk = i * ROWS + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        share = tl.minimum(pixels - chunk * span, span).to(tl.float32) / pixels
        mean = tl.load(means + chunk[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, (mean + added[None, :]) * share[:, None], 0.0), 0)
    centre = tl.sum(total, 0) / GROUP

    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(tl.cdiv(chunks, ROWS)):
        chunk = i * ROWS + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        share = tl.minimum(pixels - chunk * span, span).to(tl.float32) / pixels
        at = chunk[:, None] * channels + channel[None, :]
        away = tl.load(means + at, mask=mask, other=0.0) + added[None, :] - centre
        spread = tl.load(spreads + at, mask=mask, other=0.0) / pixels
        total += tl.sum(tl.where(mask, spread + away * away * share[:, None], 0.0), 0)
    scale, shift = _coefficients(centre, tl.sum(total, 0) / GROUP, channel, inside, weight, bias, add, eps)
    tl.store(scales + batch * channels + channel, scale, mask=inside)
    tl.store(shifts + batch * channels + channel, shift, mask=inside)


@jit(do_not_specialize=("pixels",))
def _apply_kernel(
    x, out, scales, shifts, pixels, plane, channels, sample,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += batch * sample
    out += batch * sample
    scale = tl.load(scales + batch * channels + channel, mask=inside, other=0.0)
    shift = tl.load(shifts + batch * channels + channel, mask=inside, other=0.0)
    first = tl.program_id(0) * PIXELS
    _apply(x, out, scale, shift, first, channel, inside, channels, pixels, plane, SILU, LAST, PIXELS)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> list[torch.Tensor]:
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x)
    batch, channels = x.shape[:2]
    pixels, group, last = x[0, 0].numel(), channels // groups, layout != torch.contiguous_format
    plane, sample = 16 if last else pixels, channels * pixels
    block = power_of_two(group)
    add_batch = 0 if add is None else add.stride(0)
    if pixels * group <= _WHOLE:
        _whole_kernel[(groups, batch)](
            x, out, weight, bias, add, pixels, plane, channels, sample, add_batch, eps,
            GROUP=group, SILU=silu, LAST=last, PIXELS=max(16, 8192 // block), CHANNELS=block, num_warps=8,
        )  # fmt: skip
        return [out]

    shape = {"PIXELS": 64 if last else 512, "CHANNELS": 64 if last else 8, "num_warps": 4}
    tiles = ceil_div(pixels, shape["PIXELS"] * _CHUNKS)
    span = tiles * shape["PIXELS"]
    chunks, columns = ceil_div(pixels, span), ceil_div(channels, shape["CHANNELS"])
    means, spreads = torch.empty((2, batch, chunks, channels), device=x.device, dtype=torch.float32)
    scales, shifts = torch.empty((2, batch, channels), device=x.device, dtype=torch.float32)
    _moments_kernel[(chunks, columns, batch)](
        x, means, spreads, pixels, tiles, chunks, plane, channels, sample, LAST=last, **shape
    )  # fmt: skip
    _coefficients_kernel[(groups, batch)](
        means, spreads, scales, shifts, weight, bias, add, pixels, span, chunks, channels, add_batch, eps,
        GROUP=group, ROWS=max(1, 2048 // block), CHANNELS=block, num_warps=4,
    )  # fmt: skip
    _apply_kernel[(ceil_div(pixels, shape["PIXELS"]), columns, batch)](
        x, out, scales, shifts, pixels, plane, channels, sample, SILU=silu, LAST=last, **shape
    )
    return [out]


_op = register(SCHEMA, reference=group_norm_silu_ref, launch=_launch)


def group_norm_silu(
    x: torch.Tensor,
    *,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(x + add))` for `x` [B, C, H, W] (or [B, C, S], [B, C, F, H, W]), `add` [B, C].

    Channels-last x gives a channels-last result, of the same speed or better; any other x is taken as channels first.
    Raises ValueError when the groups do not divide the channels or a vector does not fit.
    """
    if x.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide the {x.shape[1]} channels of x, of shape {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    for name, vector, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("add", add, (batch, channels)),
    ):
        if vector is not None and (vector.shape != shape or vector.stride(-1) != 1):
            raise ValueError(
                f"{name} must be {list(shape)} and contiguous for x of {list(x.shape)}, got {list(vector.shape)}"
            )
    return _op(x, weight, bias, add, groups, eps, silu)[0]


def _make(
    draw: Draw,
    *,
    batch: int = 2,
    channels: int,
    size: tuple[int, ...],
    groups: int = 32,
    last: bool = True,
    silu: bool = True,
    add: bool = False,
    mean: float = 0.0,
) -> dict[str, Any]:
    x = draw(batch, *size, channels) if last else draw(batch, channels, *size)
    return {
        "x": (x.movedim(-1, 1) if last else x) + mean,
        "weight": draw(channels),
        "bias": draw(channels),
        "add": draw(batch, channels) if add else None,
        "groups": groups,
        "eps": 1e-5,
        "silu": silu,
    }


KERNEL = Kernel(
    name="group_norm_silu",
    reference=group_norm_silu_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("whole groups", {"channels": 320, "size": (7, 5), "add": True}),
        Case("whole groups, channels first", {"channels": 96, "size": (9, 4), "last": False, "silu": False}),
        Case("whole groups, tokens", {"channels": 64, "size": (77,), "last": False, "groups": 8}),
        Case("split", {"channels": 96, "size": (27, 26), "groups": 4, "add": True}),
        Case("split, channels first", {"channels": 80, "size": (36, 32), "groups": 5, "last": False, "add": True}),
        Case("split, odd plane", {"channels": 48, "size": (37, 39), "groups": 4, "last": False, "silu": False}),
        Case("mean far from zero", {"batch": 1, "channels": 64, "size": (33, 17), "groups": 2, "mean": 50.0}),
        Case("frames", {"batch": 1, "channels": 32, "size": (3, 5, 4), "groups": 8}),
    ),
    bench=(
        Case("SDXL 320 128² b2", {"channels": 320, "size": (128, 128), "add": True}),
        Case("SDXL 640 64² b2", {"channels": 640, "size": (64, 64), "add": True}),
        Case("SDXL 1280 32² b2", {"channels": 1280, "size": (32, 32), "add": True}),
        Case("SDXL 320 128² b2, channels first", {"channels": 320, "size": (128, 128), "last": False}),
        Case("SD1.5 320 64² b2", {"channels": 320, "size": (64, 64), "add": True}),
        Case("SD1.5 1280 16² b2", {"channels": 1280, "size": (16, 16), "add": True}),
        Case("VAE 128 1024²", {"batch": 1, "channels": 128, "size": (1024, 1024)}),
    ),
)
