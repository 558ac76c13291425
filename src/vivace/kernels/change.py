"""How much a signal moved: sums of |x - y| and of |y|, which decide whether a step cache computes a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import ceil_div, jit, tl

SCHEMA = "change(Tensor x, Tensor y) -> Tensor[]"

CHUNK = 8192
"""Elements a program sums up; the sums of a sample's chunks are added by whoever reads them."""


def change_ref(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The operation in torch: of x and y `[B, S, D]` the sums `[B, chunks, 2]` in fp32."""
    x, y = x.flatten(1).float(), y.flatten(1).float()
    rest = -x.shape[1] % CHUNK
    parts = torch.stack([(x - y).abs(), y.abs()], dim=-1)  # [B, N, 2]
    return [F.pad(parts, (0, 0, 0, rest)).unflatten(1, (-1, CHUNK)).sum(2)]


@jit(do_not_specialize=("tokens", "chunks"))
def _change_kernel(x, y, out, tokens, width, chunks, CHUNK: tl.constexpr):
    # As a product, so that the width says how the memory is aligned.
    length = tokens * width
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = at < length
    a = tl.load(x + batch * length + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y + batch * length + at, mask=inside, other=0.0).to(tl.float32)
    place = out + (batch * chunks + tl.program_id(0)) * 2
    tl.store(place, tl.sum(tl.abs(a - b)))
    tl.store(place + 1, tl.sum(tl.abs(b)))


def _launch(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    batch, tokens, width = x.shape
    chunks = ceil_div(tokens * width, CHUNK)
    out = torch.empty(batch, chunks, 2, device=x.device, dtype=torch.float32)
    _change_kernel[(chunks, batch)](x, y, out, tokens, width, chunks, CHUNK=CHUNK, num_warps=8)
    return [out]


_op = register(SCHEMA, reference=change_ref, launch=_launch)


def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sums of |x - y| and |y| of every sample, for x and y of one shape [B, ...]: fp32 `[B, 2]`, on their device.

    One kernel over the inputs and a small sum. Raises ValueError where the shapes differ.
    """
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"x and y must be [B, ...] of one shape, got {list(x.shape)} and {list(y.shape)}")
    rows = [t.reshape(len(t), -1, t.shape[-1]).contiguous() for t in (x, y)]
    return _op(*rows)[0].sum(1)


def _make(draw: Draw, *, batch: int = 1, tokens: int, width: int) -> dict[str, Any]:
    return {"x": draw(batch, tokens, width), "y": draw(batch, tokens, width)}


KERNEL = Kernel(
    name="change",
    reference=change_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("less than a chunk, two samples", {"batch": 2, "tokens": 37, "width": 1}),
        Case("whole chunks", {"tokens": 2, "width": CHUNK}),
        Case("an odd rest", {"batch": 3, "tokens": 129, "width": 192}),
    ),
    bench=(
        Case("FLUX 1024²", {"tokens": 4096, "width": 3072}),
        Case("SD3.5-medium 1024² b2", {"batch": 2, "tokens": 4096, "width": 1536}),
        Case("Wan 480p x81", {"tokens": 32760, "width": 1536}),
    ),
)
