"""GroupNorm, with the SiLU that follows and the per-channel time embedding that comes before, channels last or first.

A small group is one program's work. A large one takes three launches: moments of each channel over chunks of pixels,
their sum into one scale and shift a channel, and the pass that applies them. Moments are merged as means and squared
deviations (Chan, Golub and LeVeque 1979), never as sums of squares, so a mean far from zero costs no precision.

What is normalised may still be in two parts: a sum, or channels side by side. Then the first pass joins them and
leaves the whole beside the norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, power_of_two, tl
from vivace.kernels.picture import added, apply, coefficients, joined, layout_of, moments, place

SCHEMA = (
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? add, Tensor? y, Tensor? y_bias, Tensor? after, "
    "Tensor? skip, int groups, float eps, bool silu) -> Tensor[]"
)
_WHOLE = 16384  # elements of a group up to which one program is quicker than three launches
_CHUNKS = 512  # of pixels, at most: what the second launch has to sum for each channel


def group_norm_silu_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    y: torch.Tensor | None,
    y_bias: torch.Tensor | None,
    after: torch.Tensor | None,
    skip: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store of the norm; what is joined is rounded before."""
    over_pixels = (..., *[None] * (x.ndim - 2))
    h = x.float() if skip is None else torch.cat((x, skip), 1).float()
    for vector in (y, *(v if v is None else v[over_pixels] for v in (y_bias, after))):
        h = h if vector is None else h + vector.float()
    h = h.to(x.dtype).contiguous(memory_format=layout_of(x))
    normed = h.float().contiguous()
    normed = normed if add is None else normed + add.float()[over_pixels]
    normed = normed if after is None else normed - after.float()[over_pixels]
    normed = normed.unflatten(1, (groups, -1)).flatten(2)
    normed = normed - normed.mean(2, keepdim=True)
    normed = (normed * torch.rsqrt(normed.square().mean(2, keepdim=True) + eps)).view(h.shape)
    normed = normed * weight.float()[over_pixels] + bias.float()[over_pixels]
    normed = (F.silu(normed) if silu else normed).to(x.dtype).contiguous(memory_format=layout_of(x))
    return [normed] if y is None and skip is None else [normed, h]


@jit(do_not_specialize=("pixels",))
def _whole_kernel(
    x, out, weight, bias, add, y, y_bias, after, skip, h,
    pixels, plane, own, channels, own_sample, sample, add_batch, eps,
    GROUP: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, CHANNELS) < GROUP
    channel = tl.program_id(0) * GROUP + tl.arange(0, CHANNELS)
    x += batch * own_sample
    out += batch * sample
    if y is not None:
        y += batch * sample
    if skip is not None:
        skip += batch * (sample - own_sample)
    if h is not None:
        h += batch * sample
    if add is not None:
        add += batch * add_batch
    tiles = tl.cdiv(pixels, PIXELS)
    mean, spread = moments(
        x, y, y_bias, after, skip, h, 0, tiles, channel, inside, own, channels, pixels, plane, LAST, PIXELS, CHANNELS
    )  # fmt: skip
    plus = added(add, after, channel, inside)
    mean += plus
    centre = tl.sum(mean, 0) / GROUP
    away = tl.where(inside, mean - centre, 0.0)
    variance = tl.sum(spread / pixels + away * away, 0) / GROUP
    scale, shift = coefficients(centre, variance, channel, inside, weight, bias, plus, eps)
    for i in range(tiles):
        first = i * PIXELS
        at, mask = place(first, channel, inside, channels, pixels, plane, LAST, PIXELS)
        # Joined once more: what other threads have stored cannot be read here yet.
        v = joined(x, y, y_bias, after, skip, first, channel, inside, own, channels, pixels, plane, LAST, PIXELS)
        apply(v, out, scale, shift, at, mask, SILU)


@jit(do_not_specialize=("pixels", "tiles", "chunks"))
def _moments_kernel(
    x, y, y_bias, after, skip, h, means, spreads, pixels, tiles, chunks, plane, own, channels, own_sample, sample,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += batch * own_sample
    if y is not None:
        y += batch * sample
    if skip is not None:
        skip += batch * (sample - own_sample)
    if h is not None:
        h += batch * sample
    first = chunk * tiles * PIXELS
    tiles = tl.minimum(tiles, tl.cdiv(pixels - first, PIXELS))
    mean, spread = moments(
        x, y, y_bias, after, skip, h, first, tiles, channel, inside, own, channels, pixels, plane,
        LAST, PIXELS, CHANNELS,
    )  # fmt: skip
    at = (batch * chunks + chunk) * channels + channel
    tl.store(means + at, mean, mask=inside)
    tl.store(spreads + at, spread, mask=inside)


@jit(do_not_specialize=("pixels", "span", "chunks"))
def _coefficients_kernel(
    means, spreads, scales, shifts, weight, bias, add, after, pixels, span, chunks, channels, add_batch, eps,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, CHANNELS) < GROUP
    channel = tl.program_id(0) * GROUP + tl.arange(0, CHANNELS)
    means += batch * chunks * channels
    spreads += batch * chunks * channels
    if add is not None:
        add += batch * add_batch
    plus = added(add, after, channel, inside)

    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(tl.cdiv(chunks, ROWS)):
        chunk = i * ROWS + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        share = tl.minimum(pixels - chunk * span, span).to(tl.float32) / pixels
        mean = tl.load(means + chunk[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, (mean + plus[None, :]) * share[:, None], 0.0), 0)
    centre = tl.sum(total, 0) / GROUP

    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(tl.cdiv(chunks, ROWS)):
        chunk = i * ROWS + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        share = tl.minimum(pixels - chunk * span, span).to(tl.float32) / pixels
        at = chunk[:, None] * channels + channel[None, :]
        away = tl.load(means + at, mask=mask, other=0.0) + plus[None, :] - centre
        spread = tl.load(spreads + at, mask=mask, other=0.0) / pixels
        total += tl.sum(tl.where(mask, spread + away * away * share[:, None], 0.0), 0)
    scale, shift = coefficients(centre, tl.sum(total, 0) / GROUP, channel, inside, weight, bias, plus, eps)
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
    at, mask = place(tl.program_id(0) * PIXELS, channel, inside, channels, pixels, plane, LAST, PIXELS)
    apply(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), out, scale, shift, at, mask, SILU)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    y: torch.Tensor | None,
    y_bias: torch.Tensor | None,
    after: torch.Tensor | None,
    skip: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> list[torch.Tensor]:
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    y, skip = (t if t is None else t.contiguous(memory_format=layout) for t in (y, skip))
    (batch, own), channels = x.shape[:2], len(weight)
    out = torch.empty((batch, channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)
    h = None if y is None and skip is None else torch.empty_like(out)
    made = [out] if h is None else [out, h]
    pixels, group, last = x[0, 0].numel(), channels // groups, layout != torch.contiguous_format
    plane, sizes = 16 if last else pixels, (own, channels, own * pixels, channels * pixels)
    block = power_of_two(group)
    add_batch = 0 if add is None else add.stride(0)
    if pixels * group <= _WHOLE:
        _whole_kernel[(groups, batch)](
            x, out, weight, bias, add, y, y_bias, after, skip, h, pixels, plane, *sizes, add_batch, eps,
            GROUP=group, SILU=silu, LAST=last, PIXELS=max(16, 8192 // block), CHANNELS=block, num_warps=8,
        )  # fmt: skip
        return made

    shape = {"PIXELS": 64 if last else 512, "CHANNELS": 64 if last else 8, "num_warps": 4}
    tiles = ceil_div(pixels, shape["PIXELS"] * _CHUNKS)
    span = tiles * shape["PIXELS"]
    chunks, columns = ceil_div(pixels, span), ceil_div(channels, shape["CHANNELS"])
    means, spreads = torch.empty((2, batch, chunks, channels), device=x.device, dtype=torch.float32)
    scales, shifts = torch.empty((2, batch, channels), device=x.device, dtype=torch.float32)
    _moments_kernel[(chunks, columns, batch)](
        x, y, y_bias, after, skip, h, means, spreads, pixels, tiles, chunks, plane, *sizes, LAST=last, **shape
    )  # fmt: skip
    _coefficients_kernel[(groups, batch)](
        means, spreads, scales, shifts, weight, bias, add, after, pixels, span, chunks, channels, add_batch, eps,
        GROUP=group, ROWS=max(1, 2048 // block), CHANNELS=block, num_warps=4,
    )  # fmt: skip
    _apply_kernel[(ceil_div(pixels, shape["PIXELS"]), columns, batch)](
        x if h is None else h, out, scales, shifts, pixels, plane, channels, channels * pixels,
        SILU=silu, LAST=last, **shape,
    )  # fmt: skip
    return made


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
    _check(x, x.shape[1], groups=groups, weight=weight, bias=bias, add=add)
    return _op(x, weight, bias, add, None, None, None, None, groups, eps, silu)[0]


def join_norm_silu(
    x: torch.Tensor,
    *,
    y: torch.Tensor | None = None,
    y_bias: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu(group_norm(h))` and h, which is `x + y + y_bias` or, with a `skip`, its channels after those of `x`.

    `y` is shaped as x, `skip` but for its channels; `y_bias` and `after` are [C]. The h that is returned holds `after`
    too, which the norm does not see. Raises ValueError where something does not fit.
    """
    other, channels = (y, x.shape[1]) if skip is None else (skip, x.shape[1] + skip.shape[1])
    kind = None if other is None else (other.shape[0], *other.shape[2:], other.dtype)
    fits = kind == (x.shape[0], *x.shape[2:], x.dtype) and (y is None) != (skip is None)
    if not fits or (y is not None and y.shape != x.shape):
        raise ValueError(
            f"either y as x, or skip as x but for its channels, got x {list(x.shape)}, y "
            f"{y if y is None else list(y.shape)} and skip {skip if skip is None else list(skip.shape)}, "
            "of types that may differ; join what is to be normalised before"
        )
    _check(x, channels, groups=groups, weight=weight, bias=bias, y_bias=y_bias, after=after)
    normed, h = _op(x, weight, bias, None, y, y_bias, after, skip, groups, eps, silu)
    return normed, h


def _check(x: torch.Tensor, channels: int, *, groups: int, **vectors: torch.Tensor | None) -> None:
    if channels % groups:
        raise ValueError(f"{groups} groups do not divide the {channels} channels of x, of shape {tuple(x.shape)}")
    for name, vector in vectors.items():
        shape = (len(x), channels) if name == "add" else (channels,)
        if vector is not None and (vector.shape != shape or vector.stride(-1) != 1):
            raise ValueError(
                f"{name} must be {list(shape)} and contiguous for x of {list(x.shape)}, got {list(vector.shape)}"
            )


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
    summed: bool = False,
    skipped: int = 0,
    mean: float = 0.0,
) -> dict[str, Any]:
    """`summed` of two, with vectors for now and for later; or with the last `skipped` channels apart."""

    def picture(channels: int) -> torch.Tensor:
        return draw(batch, *size, channels).movedim(-1, 1) if last else draw(batch, channels, *size)

    return {
        "x": picture(channels - skipped) + mean,
        "weight": draw(channels),
        "bias": draw(channels),
        "add": draw(batch, channels) if add else None,
        "y": picture(channels) if summed else None,
        "y_bias": draw(channels) if summed else None,
        "after": draw(channels) if summed else None,
        "skip": picture(skipped) if skipped else None,
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
        Case("a sum", {"channels": 64, "size": (7, 5), "groups": 4, "summed": True, "silu": False}),
        Case("a sum, channels first", {"channels": 48, "size": (9, 4), "groups": 4, "last": False, "summed": True}),
        Case("a sum, split", {"channels": 96, "size": (27, 26), "groups": 4, "summed": True}),
        Case("side by side", {"channels": 72, "size": (7, 5), "groups": 4, "skipped": 32, "add": True}),
        Case("side by side, split", {"channels": 96, "size": (27, 26), "groups": 4, "skipped": 40}),
        Case(
            "side by side, channels first",
            {"channels": 48, "size": (37, 39), "groups": 4, "last": False, "skipped": 20},
        ),
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
        Case("SD1.5 320 64² b2, a sum", {"channels": 320, "size": (64, 64), "summed": True, "silu": False}),
        Case("SD1.5 960 64² b2, side by side", {"channels": 960, "size": (64, 64), "skipped": 320}),
        Case("VAE 128 1024²", {"batch": 1, "channels": 128, "size": (1024, 1024)}),
    ),
)
