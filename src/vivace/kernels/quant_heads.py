"""q, k and v in e4m3, as fp8 attention reads them: less their mean, rotated where asked, one scale a head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, power_of_two, tl
from vivace.kernels.row import FORMATS, within_e4m3

SCHEMA = "quant_heads(Tensor x, Tensor? mean, Tensor? scale, Tensor? rotation) -> Tensor[]"
LIMIT = FORMATS["fp8"].limit
ROWS = 32


@lru_cache
def hadamard(depth: int, *, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Sylvester's matrix [D, D] of 1 and -1; over sqrt(D) it is a rotation, and it spreads an outlier over a head.

    `depth` is a power of two, of at least 16 for the kernel.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < depth:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.to(device, dtype)


def quant_heads_ref(
    x: torch.Tensor, mean: torch.Tensor | None, scale: torch.Tensor | None, rotation: torch.Tensor | None
) -> list[torch.Tensor]:
    """The operation in torch, in fp32 between one load and one store."""
    y = x.float()
    y = y - mean.float()[:, None] if mean is not None else y
    y = y.half().float() @ rotation.float() * x.shape[-1] ** -0.5 if rotation is not None else y
    y = y / scale.float()[:, None, :, None] if scale is not None else y
    return [y.clamp(-LIMIT, LIMIT).to(torch.float8_e4m3fn).contiguous()]


@jit(do_not_specialize=("tokens",))
def _quant_heads_kernel(
    x, mean, scale, rotation, out, tokens, heads, depth, x_batch, x_token, x_head, mean_batch, mean_head, scale_batch,
    scale_head, root, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < depth
    mask = (rows < tokens)[:, None] & inside[None, :]
    far = rows.to(tl.int64)[:, None]
    y = tl.load(x + batch * x_batch + far * x_token + head * x_head + columns[None, :], mask=mask, other=0.0)
    y = y.to(tl.float32)
    if mean is not None:
        y = y - tl.load(mean + batch * mean_batch + head * mean_head + columns, mask=inside, other=0.0)[None, :]
    if rotation is not None:
        turn = tl.load(rotation + columns[:, None] * BLOCK + columns[None, :])
        y = tl.dot(y.to(tl.float16), turn) * root
    if scale is not None:
        y = y / tl.load(scale + batch * scale_batch + head * scale_head)
    at = ((batch * tokens + far) * heads + head) * depth + columns[None, :]
    tl.store(out + at, within_e4m3(y).to(out.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, mean: torch.Tensor | None, scale: torch.Tensor | None, rotation: torch.Tensor | None
) -> list[torch.Tensor]:
    batch, tokens, heads, depth = x.shape
    out = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    _quant_heads_kernel[(ceil_div(tokens, ROWS), heads, batch)](
        x, mean, scale, rotation, out, tokens, heads, depth, *x.stride()[:3],
        *((0, 0) if mean is None else mean.stride()[:2]), *((0, 0) if scale is None else scale.stride()), depth**-0.5,
        ROWS=ROWS, BLOCK=power_of_two(depth), num_warps=4,
    )  # fmt: skip
    return [out]


_op = register(SCHEMA, reference=quant_heads_ref, launch=_launch)


def quant_heads(
    x: torch.Tensor,
    *,
    mean: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    rotate: bool = False,
) -> torch.Tensor:
    """`(x - mean) H / scale` in e4m3, contiguous [B, S, H, D], held within what e4m3 can say.

    `x` is [B, S, H, D] with D innermost, `mean` [B, H, D] and `scale` [B, H] are fp32. `rotate` multiplies every head
    with a Hadamard matrix, which takes a D that is a power of two. Raises ValueError where a size does not fit.
    """
    batch, _, heads, depth = x.shape
    if x.stride(-1) != 1:
        raise ValueError(f"x must be contiguous in its last dimension, got strides {x.stride()}")
    for name, given, wanted in (("mean", mean, (batch, heads, depth)), ("scale", scale, (batch, heads))):
        if given is not None and (given.shape != wanted or given.dtype != torch.float32):
            raise ValueError(f"{name} must be {list(wanted)} float32, got {list(given.shape)} {given.dtype}")
    if rotate and (depth < 16 or depth != power_of_two(depth)):
        raise ValueError(f"rotate takes heads of 16, 32, 64 or 128, got {depth}; leave it out")
    return _op(x, mean, scale, hadamard(depth, device=x.device) if rotate else None)[0]


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    heads: int,
    depth: int,
    smooth: bool = False,
    scaled: bool = False,
    rotate: bool = False,
    pad: int = 0,
) -> dict[str, Any]:
    return {
        "x": draw(batch, tokens, heads * depth, pad=pad).unflatten(-1, (heads, depth)),
        "mean": draw(batch, heads, depth, dtype=torch.float32) if smooth else None,
        "scale": draw(batch, heads, dtype=torch.float32).abs() + 0.1 if scaled else None,
        "rotation": hadamard(depth, device=draw.device) if rotate else None,
    }


def _bytes_moved(arguments: Mapping[str, Any], results: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in (arguments["x"], *results))


KERNEL = Kernel(
    name="quant_heads",
    reference=quant_heads_ref,
    launch=_launch,
    op=_op,
    make=_make,
    bytes_moved=_bytes_moved,
    cases=(
        Case("plain, odd length", {"batch": 2, "tokens": 37, "heads": 3, "depth": 64}),
        Case("smoothed keys, a view", {"batch": 2, "tokens": 5, "heads": 2, "depth": 128, "smooth": True, "pad": 64}),
        Case("scaled values, head size 72", {"batch": 2, "tokens": 9, "heads": 2, "depth": 72, "scaled": True}),
        Case("smoothed and rotated", {"tokens": 33, "heads": 2, "depth": 64, "smooth": True, "rotate": True}),
    ),
    bench=(
        Case("FLUX 1024² q", {"tokens": 4608, "heads": 24, "depth": 128}),
        Case("FLUX 1024² k, smoothed", {"tokens": 4608, "heads": 24, "depth": 128, "smooth": True}),
        Case("FLUX 1024² k, rotated", {"tokens": 4608, "heads": 24, "depth": 128, "smooth": True, "rotate": True}),
        Case("SDXL 640 b2 v", {"batch": 2, "tokens": 4096, "heads": 10, "depth": 64, "scaled": True}),
    ),
    since=89,  # older GPUs have no conversion to fp8
)
