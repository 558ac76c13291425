"""GroupNorm, with the SiLU that follows and the per-channel time embedding that comes before, channels last or first.

A small group is one program's work. A large one takes two launches: sums of each group over chunks of pixels, and a
pass in which every program adds up its groups' sums and normalises one chunk. Values are summed as differences from one
value of their group, and so are their squares (Chan, Golub and LeVeque 1983): a mean far from zero costs no precision.
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
_WHOLE = 16384  # elements of a group up to which one program is quicker than two launches
_TILE, _WARPS = 4096, 8  # elements that a program holds at a time, and its warps
_PROGRAMS, _CHUNKS = 1024, 64  # programs that keep a large GPU busy; the chunks that a column may have anyway


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
def _sums(
    x, origin, first, tiles, channel, in_channels, channels, pixels, plane,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of each channel's values and of their squares [C] over `tiles` tiles, `origin` [C] taken away before."""
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in range(tiles):
        at, mask = place(first + i * PIXELS, channel, in_channels, channels, pixels, plane, LAST, PIXELS)
        v = tl.where(mask, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - origin[None, :], 0.0)
        total += v
        square += v * v
    return tl.sum(total, 0), tl.sum(square, 0)


@jit
def _origin(x, add, channel, first_of_group, in_channels, plane, LAST: tl.constexpr):
    """What `_sums` takes away [C]: of x + add, the first pixel of the group's first channel; minus `add`."""
    step = 1 if LAST else plane
    origin = tl.load(x + first_of_group.to(tl.int64) * step, mask=in_channels, other=0.0).to(tl.float32)
    if add is not None:
        origin += tl.load(add + first_of_group, mask=in_channels, other=0.0).to(tl.float32)
        origin -= tl.load(add + channel, mask=in_channels, other=0.0).to(tl.float32)
    return origin


@jit
def _apply(
    x, out, weight, bias, mean, variance, eps, first, tiles, channel, in_channels, channels, pixels, plane,
    SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Normalise `tiles` tiles of pixels with the mean and variance of each channel [C], which has no `add`."""
    scale = tl.rsqrt(variance + eps) * tl.load(weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32) - mean * scale
    for i in range(tiles):
        at, mask = place(first + i * PIXELS, channel, in_channels, channels, pixels, plane, LAST, PIXELS)
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
    if add is not None:
        add += batch * add_batch
    tiles = tl.cdiv(pixels, PIXELS)
    origin = _origin(x, add, channel, channel - channel % GROUP, inside, plane, LAST)
    total, square = _sums(x, origin, 0, tiles, channel, inside, channels, pixels, plane, LAST, PIXELS, CHANNELS)
    values = pixels * GROUP * 1.0
    away = tl.sum(total, 0) / values
    variance = tl.sum(square, 0) / values - away * away
    _apply(
        x, out, weight, bias, away + origin, variance, eps, 0, tiles, channel, inside, channels, pixels, plane,
        SILU, LAST, PIXELS,
    )  # fmt: skip


@jit
def _column(channels, SPAN: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """This program's channels [C], which of them exist; its groups [G], which exist; and which are whose [C, G]."""
    lane, number = tl.arange(0, CHANNELS), tl.arange(0, GROUPS)
    channel = tl.program_id(1) * SPAN + lane
    group = tl.program_id(1) * (SPAN // GROUP) + number
    held = (number < SPAN // GROUP) & (group < channels // GROUP)
    return channel, (lane < SPAN) & (channel < channels), group, held, (lane // GROUP)[:, None] == number[None, :]


@jit(do_not_specialize=("pixels", "tiles", "chunks"))
def _sums_kernel(
    x, add, sums, pixels, tiles, chunks, plane, channels, sample, add_batch,
    SPAN: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel, inside, group, held, mine = _column(channels, SPAN, GROUP, CHANNELS, GROUPS)
    x += batch * sample
    if add is not None:
        add += batch * add_batch
    origin = _origin(x, add, channel, channel - channel % GROUP, inside, plane, LAST)
    first = chunk * tiles * PIXELS
    tiles = tl.minimum(tiles, tl.cdiv(pixels - first, PIXELS))
    total, square = _sums(x, origin, first, tiles, channel, inside, channels, pixels, plane, LAST, PIXELS, CHANNELS)
    groups = channels // GROUP
    at = sums + (batch * chunks + chunk) * 2 * groups + group
    tl.store(at, tl.sum(tl.where(mine, total[:, None], 0.0), 0), mask=held)
    tl.store(at + groups, tl.sum(tl.where(mine, square[:, None], 0.0), 0), mask=held)


@jit(do_not_specialize=("pixels", "tiles", "chunks"))
def _apply_kernel(
    x, out, sums, weight, bias, add, pixels, tiles, chunks, plane, channels, sample, add_batch, eps,
    SPAN: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel, inside, group, held, mine = _column(channels, SPAN, GROUP, CHANNELS, GROUPS)
    groups = channels // GROUP
    sums += batch * chunks * 2 * groups
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    square = tl.zeros((ROWS, GROUPS), tl.float32)
    for i in range(tl.cdiv(chunks, ROWS)):
        row = i * ROWS + tl.arange(0, ROWS)
        mask = (row < chunks)[:, None] & held[None, :]
        at = sums + row[:, None] * 2 * groups + group[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        square += tl.load(at + groups, mask=mask, other=0.0)
    values = pixels * GROUP * 1.0
    away = tl.sum(total, 0) / values
    variance = tl.sum(square, 0) / values - away * away

    x += batch * sample
    out += batch * sample
    if add is not None:
        add += batch * add_batch
    mean = _origin(x, add, channel, channel - channel % GROUP, inside, plane, LAST)
    mean += tl.sum(tl.where(mine, away[None, :], 0.0), 1)
    variance = tl.sum(tl.where(mine, variance[None, :], 0.0), 1)
    first = chunk * tiles * PIXELS
    tiles = tl.minimum(tiles, tl.cdiv(pixels - first, PIXELS))
    _apply(
        x, out, weight, bias, mean, variance, eps, first, tiles, channel, inside, channels, pixels, plane,
        SILU, LAST, PIXELS,
    )  # fmt: skip


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
    add_batch = 0 if add is None else add.stride(0)
    if pixels * group <= _WHOLE:
        block = power_of_two(group)
        _whole_kernel[(groups, batch)](
            x, out, weight, bias, add, pixels, plane, channels, sample, add_batch, eps,
            GROUP=group, SILU=silu, LAST=last, PIXELS=max(16, 8192 // block), CHANNELS=block, num_warps=8,
        )  # fmt: skip
        return [out]

    # A column is as many whole groups as fill a row of a tile: wide rows where channels lie side by side.
    row = max(128 if last else 8, power_of_two(group))
    span = row // group * group
    shape = {"SPAN": span, "GROUP": group, "LAST": last, "CHANNELS": power_of_two(span)}
    shape |= {"PIXELS": max(16, _TILE // shape["CHANNELS"]), "GROUPS": power_of_two(span // group)}
    columns = ceil_div(channels, span)
    tiles = ceil_div(pixels, shape["PIXELS"])
    tiles = ceil_div(tiles, min(tiles, max(_CHUNKS, _PROGRAMS // (columns * batch))))
    chunks = ceil_div(pixels, tiles * shape["PIXELS"])
    sums = torch.empty((batch, chunks, 2, groups), device=x.device, dtype=torch.float32)
    grid = (chunks, columns, batch)
    _sums_kernel[grid](
        x, add, sums, pixels, tiles, chunks, plane, channels, sample, add_batch, **shape, num_warps=_WARPS
    )  # fmt: skip
    _apply_kernel[grid](
        x, out, sums, weight, bias, add, pixels, tiles, chunks, plane, channels, sample, add_batch, eps,
        SILU=silu, ROWS=128, **shape, num_warps=_WARPS,
    )  # fmt: skip
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
