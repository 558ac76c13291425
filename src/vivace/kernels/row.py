"""What the row kernels share: how rows become tiles, the normalisation of a row, and its row-scaled 8-bit form.

A row is the last dimension, and has to be contiguous; batches and tokens may have any stride. A program takes a tile of
`rows` tokens of one sample, so that the sample's modulation is read once a tile. Where every token has a modulation of
its own (`[B, S, D]` instead of `[B, D]`), it is read like the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from vivace.kernels.language import INTERPRETED, jit, power_of_two, tl

Quantize = Literal["fp8", "int8"]


class Sum(NamedTuple):
    """A modulation vector in two terms, which are added in fp32 where it is used."""

    own: torch.Tensor  # [B, D] of a sample, or [B, S, D] of a token
    base: torch.Tensor  # [D], which all have in common


Vector = torch.Tensor | Sum | None


def terms(*vectors: Vector) -> tuple[torch.Tensor | None, ...]:
    """The own terms of `vectors`, then their bases."""
    pairs = [vector if isinstance(vector, Sum) else (vector, None) for vector in vectors]
    return (*(own for own, _ in pairs), *(base for _, base in pairs))


def vector_ref(own: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """A modulation vector in fp32, [B, 1, D] or [B, S, D]."""
    own = own.float() if own.ndim == 3 else own.float()[:, None]
    return own if base is None else own + base.float()


class RowScaled(NamedTuple):
    """An 8-bit matrix, as row-wise scaled GEMMs take it.

    fp8 is symmetric: `values * scales` is what was meant. int8 is not, since what comes out of a GELU or SiLU leans to
    one side: a row has a scale and an offset, and `values * scales[..., :1] + scales[..., 1:]` was meant.
    """

    values: torch.Tensor  # [B, S, D], float8_e4m3fn or int8
    scales: torch.Tensor  # [B, S, 1] (fp8) or [B, S, 2] (int8), float32

    def dense(self) -> torch.Tensor:
        """What was meant, [B, S, D] float32."""
        meant = self.values.float() * self.scales[..., :1]
        return meant + self.scales[..., 1:] if self.scales.shape[-1] == 2 else meant


class HeadScaled(NamedTuple):
    """Heads in e4m3, as fp8 attention takes v and leaves its output: `values * scales` is what was meant."""

    values: torch.Tensor  # [B, S, H, D], float8_e4m3fn
    scales: torch.Tensor  # [B, H], float32

    def dense(self) -> torch.Tensor:
        """What was meant, as rows [B, S, H D] float32."""
        return (self.values.float() * self.scales[:, None, :, None]).flatten(2)


class Format(NamedTuple):
    dtype: torch.dtype
    limit: float  # the largest magnitude it holds
    factors: int  # a row's: a scale, or a scale and an offset


FORMATS: dict[str | None, Format] = {
    "fp8": Format(torch.float8_e4m3fn, 448.0, 1),
    "int8": Format(torch.int8, 127.0, 2),
}


# The interpreter's cast to e4m3 drops the mantissa's carry (1.944 becomes 1.0), so there a value is rounded before it.
ROUND_FIRST = tl.constexpr(INTERPRETED) if tl else INTERPRETED
E4M3_LIMIT = tl.constexpr(448.0) if tl else 448.0

# Rounding to the nearest value of an 8-bit format can go either way where fp32 sums differ in their last bit.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {torch.float8_e4m3fn: (2**-3, 2**-9), torch.int8: (0.0, 1.0)}


MOST_VALUES = 40
"""Columns of a row that a thread holds at most, as long as there are more threads to take."""


class Tile(NamedTuple):
    """How a program covers its rows: `rows` of them, `block` columns (a power of two), by `warps` warps."""

    rows: int
    block: int
    warps: int


def tile(width: int) -> Tile:
    """The tile of a kernel that holds whole rows of `width` columns.

    A warp covers 256 columns at a time (`columns_of`), and what of the block lies beyond the width is known when the
    kernel is compiled: no thread computes it. So few warps as hold a row share it, most often one, which then waits
    for no other; 20 to 40 values a thread keep enough loads in flight, and narrow rows share a warp.
    """
    block = power_of_two(width)
    enough = (warps for warps in (1, 2, 4, 8) if _covered(width, warps) <= MOST_VALUES * 32 * warps)
    warps = next(enough, 16)
    rows = max(1, min(16, 1024 * warps // min(block, _covered(width, warps))))
    return Tile(rows, block, warps)


def _covered(width: int, warps: int) -> int:
    """Columns that `warps` warps go through for a row, in steps of 256 each."""
    step = 256 * warps
    return (width + step - 1) // step * step


def part(width: int) -> Tile:
    """The tile of a kernel that needs no whole rows: 4096 values, in columns of which few lie beyond `width`."""
    blocks = (1024, 512, 256, 128, 64)
    block = min(power_of_two(width), min(blocks, key=lambda block: -width % block))
    rows = min(16, 4096 // block)
    return Tile(rows, block, max(1, rows * block // 1024))


def tokens_of(x: torch.Tensor, name: str) -> torch.Tensor:
    """`x` as [B, S, D], a view. Raises ValueError when the last dimension is not contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {x.stride()}; call .contiguous()"
        )
    return x if x.ndim == 3 else x.unsqueeze(0) if x.ndim == 2 else x.reshape(-1, x.shape[-2], x.shape[-1])


def check_vectors(
    x: torch.Tensor, *, modulation: Mapping[str, Vector], shared: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError unless the given vectors fit `x` [B, S, D]: [B, D] a sample each, or one [D] for all.

    Those of the modulation may all be [B, S, D] instead, a token each. A kernel reads them by pointer: where torch
    would broadcast or refuse, it would read another tensor's memory.
    """
    batch, tokens, width = x.shape
    given = {name: vector for name, vector in modulation.items() if vector is not None}
    owns = {name: vector.own if isinstance(vector, Sum) else vector for name, vector in given.items()}
    bases = {f"{name}'s base": vector.base for name, vector in given.items() if isinstance(vector, Sum)}
    each = any(own.ndim == 3 for own in owns.values())
    sizes = (batch, tokens, width) if each else (batch, width)
    for vectors, shape in ((owns, sizes), (bases | dict(shared or {}), (width,))):
        for name, vector in vectors.items():
            if vector is not None and (vector.shape != shape or vector.stride(-1) != 1):
                raise ValueError(
                    f"{name} must be {list(shape)} for x of {list(x.shape)} and contiguous in its last dimension, got "
                    f"{list(vector.shape)} with strides {vector.stride()}; expand or reshape it"
                )


def strides_of(*vectors: torch.Tensor | None) -> tuple[int, ...]:
    """For each vector of a modulation, how far apart its samples and its tokens lie."""
    return tuple(
        step for v in vectors for step in ((0, 0) if v is None else (v.stride(0), v.stride(-2) * (v.ndim - 2)))
    )


def of_tokens(*vectors: torch.Tensor | None) -> bool:
    """Whether every token has a modulation of its own."""
    return any(vector is not None and vector.ndim == 3 for vector in vectors)


def rows_like(x: torch.Tensor, quantize: str | None, *, width: int | None = None, room: int = 0) -> list[torch.Tensor]:
    """Space for rows shaped as those of `x`: [values] as they are, or [values, scales].

    It is contiguous, unless there shall be `room` for more columns behind each row of values.
    """
    shape = (*x.shape[:-1], width or x.shape[-1])
    if quantize is None:
        return [with_room(shape, room, like=x)]
    to = FORMATS[quantize]
    values = torch.empty(shape, device=x.device, dtype=to.dtype)
    return [values, torch.empty((*x.shape[:-1], to.factors), device=x.device, dtype=torch.float32)]


def with_room(shape: tuple[int, ...], room: int, *, like: torch.Tensor) -> torch.Tensor:
    """Space for rows of `shape`, with `room` for more columns behind each of them."""
    wide = torch.empty((*shape[:-1], shape[-1] + room), device=like.device, dtype=like.dtype)
    return wide[..., : shape[-1]] if room else wide


def shaped(made: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor | RowScaled:
    """What `rows_like` made, under the leading dimensions of `x`."""
    made = [t.view(*x.shape[:-1], t.shape[-1]) for t in made]
    return made[0] if len(made) == 1 else RowScaled(*made)


def limit_of(quantize: str | None) -> float:
    """The constant the kernels take: 0 means "store as it is"."""
    return 0.0 if quantize is None else FORMATS[quantize].limit


def rows_ref(y: torch.Tensor, dtype: torch.dtype, quantize: str | None, *, room: int = 0) -> list[torch.Tensor]:
    """`y` (fp32) cast to `dtype`, or scaled row by row into an 8-bit format: [values] or [values, scales]."""
    if quantize is None:
        y = y.to(dtype)
        return [with_room(tuple(y.shape), room, like=y).copy_(y) if room else y.contiguous()]
    to = FORMATS[quantize]
    if to.factors == 2:
        low, high = y.aminmax(dim=-1, keepdim=True)
        # Where all of a row is one number the offset alone says it, and the values are 0.
        scale = (high - low).clamp_min(1e-12) / 255
        offset = low + 128 * scale
        values = ((y - offset) / scale).round().clamp(-128, 127)
        return [values.to(to.dtype).contiguous(), torch.cat((scale, offset), -1)]
    scale = y.abs().amax(-1, keepdim=True).clamp_min(1e-12) / to.limit
    return [(y / scale).to(to.dtype).contiguous(), scale.contiguous()]


def norm_ref(x: torch.Tensor, eps: float, kind: str) -> torch.Tensor:
    """LayerNorm ("layer") or RMSNorm ("rms") of the last dimension of `x` (fp32), without weights."""
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@jit
def columns_of(BLOCK: tl.constexpr):
    """A tile's columns, eight to a thread: 16 bytes in 16 bit.

    Left alone, a store in 8 bits asks for sixteen, and all that was computed moves to other threads before it.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK), 8)


@jit
def load_columns(pointer, columns, mask):
    """[1, C] fp32, for a vector that all rows of a tile share."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)[None, :]


@jit
def load_vector(own, base, sample, token, rows, columns, inside, mask, EACH: tl.constexpr):
    """A sample's modulation [1, C] in fp32, or that of each token [R, C]."""
    if EACH:
        at = own + sample + rows.to(tl.int64)[:, None] * token + columns[None, :]
        vector = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        vector = load_columns(own + sample, columns, inside)
    if base is not None:
        vector = vector + load_columns(base, columns, inside)
    return vector


@jit
def normalize(x, mask, width, eps, KIND: tl.constexpr):
    """LayerNorm or RMSNorm of the rows of `x` [R, C] (fp32, zero outside `mask`), without weights."""
    if KIND == "layer":
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]


@jit
def round_to_e4m3(y):
    """The nearest value that e4m3 holds, ties to even, of |y| <= 448 (fp32)."""
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    # Below 2**-6 its values are multiples of 2**-9; adding 1.5 * 2**14 leaves no finer fraction.
    return tl.where(tl.abs(y) < 0.015625, (y + 24576.0) - 24576.0, normal)


@jit
def within_e4m3(y):
    """`y` (fp32) held within what e4m3 can say, ready for the cast; NaN stays NaN."""
    y = tl.clamp(y, -E4M3_LIMIT, E4M3_LIMIT, tl.PropagateNan.ALL)
    if ROUND_FIRST:
        y = round_to_e4m3(y)
    return y


@jit
def extremes(y, mask, kind: tl.constexpr):
    """The lowest and the highest of each row of `y` [R, C] (fp32); for e4m3 the largest magnitude alone, twice."""
    if kind == tl.int8:
        # Neither end sees a NaN, nor can int8 hold one: through the lowest the row's offset has it.
        unseen = tl.sum(tl.where(mask, y, 0.0), 1) * 0.0
        return tl.min(tl.where(mask, y, 1e30), 1) + unseen, tl.max(tl.where(mask, y, -1e30), 1)
    largest = tl.max(tl.abs(tl.where(mask, y, 0.0)), 1)
    return largest, largest


@jit
def factors(low, high, kind: tl.constexpr, LIMIT: tl.constexpr):
    """Scale and offset of rows between `low` and `high`; e4m3 has no offset."""
    if kind == tl.int8:
        scale = tl.maximum(high - low, 1e-12) / 255.0  # pyright: ignore[reportOperatorIssue]
        return scale, low + 128.0 * scale
    return tl.maximum(high, 1e-12) / LIMIT, tl.zeros_like(high)


@jit
def store_factors(row_scale, first, rows, scale, offset, tokens, kind: tl.constexpr):
    """Stores what `factors` made for rows `first + rows`."""
    if kind == tl.int8:
        tl.store(row_scale + (first + rows) * 2, scale, mask=rows < tokens)
        tl.store(row_scale + (first + rows) * 2 + 1, offset, mask=rows < tokens)
    else:
        tl.store(row_scale + first + rows, scale, mask=rows < tokens)


@jit
def scaled(y, mask, scale, offset, kind: tl.constexpr):
    """`y` [R, C] (fp32) over its rows' factors, ready for the cast to `kind`."""
    if kind == tl.int8:
        y = tl.where(mask, y - offset[:, None], 0.0) * (1.0 / scale)[:, None]
        # Adding 1.5 * 2**23 leaves no fraction bits: rounds to nearest even, as torch does.
        return tl.minimum(tl.maximum((y + 12582912.0) - 12582912.0, -128.0), 127.0)
    y = tl.where(mask, y, 0.0) * (1.0 / scale)[:, None]
    if ROUND_FIRST:
        y = round_to_e4m3(y)
    return y


@jit
def store_rows(out, row_scale, first, rows, columns, y, mask, tokens, width, LIMIT: tl.constexpr):
    """Stores `y` [R, C] (fp32) into rows `first + rows`, `width` apart; with LIMIT, scaled row by row into 8 bits."""
    kind: tl.constexpr = out.dtype.element_ty
    if LIMIT > 0:
        low, high = extremes(y, mask, kind)
        scale, offset = factors(low, high, kind, LIMIT)
        store_factors(row_scale, first, rows, scale, offset, tokens, kind)
        y = scaled(y, mask, scale, offset, kind)
    tl.store(out + (first + rows)[:, None] * width + columns[None, :], y.to(kind), mask=mask)
