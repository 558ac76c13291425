"""Attention of many queries to few keys: a picture's tokens to a prompt's.

The library's kernels are made for long sequences; with the 77 or 300 keys of a prompt they take several times as long
as reading q and writing the output. A head's size need not be a power of two here: it is a large part and a small one.

Keys and values come by asynchronous copies of 16 bytes, so strides have to be in eights. Copied otherwise the two parts
of v take turns at one place in shared memory, and the ptxas of CUDA 12.8, which Triton 3.6 brings, then takes the small
part's address from a register that nothing wrote: an illegal memory access, or a wrong product.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import EMULATED, ceil_div, jit, power_of_two, tl

SCHEMA = "cross_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor[]"
ROWS = 128  # queries a program
UNIT = tl.constexpr(8) if tl else 8  # elements that every stride is a multiple of


def cross_attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """The operation in torch, in fp32."""
    scores = torch.einsum("bshd,bthd->bhst", q.float() * scale, k.float())
    return [torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.float()).to(q.dtype).contiguous()]


@jit
def _product(a, b, sums, PRECISION: tl.constexpr):
    """`sums + a @ b`; the interpreter multiplies no bfloat16."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


STRIDES = tuple(f"{name}_{dimension}" for name in "qkv" for dimension in ("batch", "token", "head"))


@jit(do_not_specialize=("tokens", "keys", "heads", *STRIDES))
def _cross_attention_kernel(
    q, k, v, out, tokens, keys, heads, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, DEPTH: tl.constexpr, LARGE: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, far = (rows < tokens)[:, None], rows.to(tl.int64)[:, None]
    large, small = tl.arange(0, LARGE)[None, :], LARGE + tl.arange(0, SMALL)[None, :]
    within = small < DEPTH
    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + head * k_head) * UNIT
    v += (batch * v_batch + head * v_head) * UNIT

    query = tl.load(q + far * q_token * UNIT + large, mask=there, other=0.0)
    total, most = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    sum_large = tl.zeros([ROWS, LARGE], tl.float32)
    if LARGE < DEPTH:
        query_small = tl.load(q + far * q_token * UNIT + small, mask=there & within, other=0.0)
        sum_small = tl.zeros([ROWS, SMALL], tl.float32)
    for start in range(0, keys, KEYS):
        at = start + tl.arange(0, KEYS)
        real, place = (at < keys)[:, None], at.to(tl.int64)[:, None]
        key = tl.load(k + place * k_token * UNIT + large, mask=real, other=0.0)
        scores = _product(query, tl.trans(key), tl.zeros([ROWS, KEYS], tl.float32), PRECISION)
        if LARGE < DEPTH:
            key = tl.load(k + place * k_token * UNIT + small, mask=real & within, other=0.0)
            scores = _product(query_small, tl.trans(key), scores, PRECISION)
        scores = tl.where((at < keys)[None, :], scores * scale, float("-inf"))  # scale is in powers of two

        new = tl.maximum(most, tl.max(scores, 1))
        weights, fade = tl.exp2(scores - new[:, None]), tl.exp2(most - new)
        total, most = total * fade + tl.sum(weights, 1), new
        weights = weights.to(v.dtype.element_ty)
        value = tl.load(v + place * v_token * UNIT + large, mask=real, other=0.0)
        sum_large = _product(weights, value, sum_large * fade[:, None], PRECISION)
        if LARGE < DEPTH:
            value = tl.load(v + place * v_token * UNIT + small, mask=real & within, other=0.0)
            sum_small = _product(weights, value, sum_small * fade[:, None], PRECISION)

    out += ((batch * tokens + far) * heads + head) * DEPTH
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(out + large, (sum_large / total[:, None]).to(kind), mask=there)
    if LARGE < DEPTH:
        tl.store(out + small, (sum_small / total[:, None]).to(kind), mask=there & within)


def _launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list[torch.Tensor]:
    batch, tokens, heads, depth = q.shape
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    q, k, v = map(_in_eights, (q, k, v))
    strides = (stride // 8 for x in (q, k, v) for stride in x.stride()[:3])
    large = max(16, power_of_two(depth + 1) // 2)
    _cross_attention_kernel[(ceil_div(tokens, ROWS), batch * heads)](
        q, k, v, out, tokens, k.shape[1], heads, *strides,
        scale * math.log2(math.e), DEPTH=depth, LARGE=large, SMALL=max(16, power_of_two(depth - large)),
        # Two stages in the 99 KiB of shared memory that consumer cards give a program.
        ROWS=ROWS, KEYS=64 if depth <= 128 else 32, num_warps=8, num_stages=2,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return [out]


def _in_eights(x: torch.Tensor) -> torch.Tensor:
    """`x` where 8 of its elements can be copied at a time wherever a token begins, else a copy of it."""
    fits = x.data_ptr() % 16 == 0 and not any(stride % 8 for stride in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


_op = register(SCHEMA, reference=cross_attention_ref, launch=_launch)


def cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Attention of q [B, S, H, D] to k and v [B, T, H, D], in q's type; `scale` of None is 1 / sqrt(D).

    Raises ValueError where the sizes do not fit, a head is smaller than 16 or no multiple of 8, or a last dimension is
    not contiguous.
    """
    batch, _, heads, depth = q.shape
    fits = k.shape == v.shape == (batch, k.shape[1], heads, depth) and k.shape[1] > 0
    if not fits or depth < 16 or depth % 8:
        raise ValueError(
            "q [B, S, H, D], k and v [B, T, H, D] with D a multiple of 8 from 16 on, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("q, k and v must be contiguous in their last dimension; call .contiguous()")
    return _op(q, k, v, depth**-0.5 if scale is None else scale)[0]


def _make(
    draw: Draw, *, batch: int = 1, tokens: int, keys: int, heads: int, depth: int, joined: bool = False, pad: int = 0
) -> dict[str, Any]:
    """With `joined`, k and v are halves of one product."""
    q = draw(batch, tokens, heads * depth, pad=pad).unflatten(-1, (heads, depth))
    if joined:
        k, v = draw(batch, keys, 2 * heads * depth).unflatten(-1, (2, heads, depth)).unbind(2)
    else:
        k, v = (draw(batch, keys, heads, depth) for _ in range(2))
    return {"q": q, "k": k, "v": v, "scale": depth**-0.5}


KERNEL = Kernel(
    name="cross_attention",
    reference=cross_attention_ref,
    launch=_launch,
    op=_op,
    make=_make,
    cases=(
        Case("SDXL's heads, odd lengths", {"batch": 2, "tokens": 133, "keys": 77, "heads": 2, "depth": 64}),
        Case("head size 72, k and v joined", {"tokens": 37, "keys": 120, "heads": 2, "depth": 72, "joined": True}),
        Case("head size 40, a view", {"batch": 2, "tokens": 9, "keys": 77, "heads": 3, "depth": 40, "pad": 64}),
        Case("head size 160, one key", {"tokens": 5, "keys": 1, "heads": 2, "depth": 160}),
        Case("unaligned, a view", {"tokens": 37, "keys": 77, "heads": 2, "depth": 40, "pad": 6}),
        Case("head size 128, many keys", {"tokens": 130, "keys": 300, "heads": 1, "depth": 128}),
    ),
    bench=(
        Case("SDXL 640 b2", {"batch": 2, "tokens": 4096, "keys": 77, "heads": 10, "depth": 64}),
        Case("SDXL 1280 b2", {"batch": 2, "tokens": 1024, "keys": 77, "heads": 20, "depth": 64}),
        Case("SD1.5 320 b2", {"batch": 2, "tokens": 4096, "keys": 77, "heads": 8, "depth": 40}),
        Case("PixArt 1024² b2", {"batch": 2, "tokens": 4096, "keys": 300, "heads": 16, "depth": 72}),
        Case("PixArt 1024² b2, 120 keys", {"batch": 2, "tokens": 4096, "keys": 120, "heads": 16, "depth": 72}),
        Case("Wan 14B 832x480x81", {"tokens": 32760, "keys": 512, "heads": 40, "depth": 128}),
    ),
    # The weights are rounded to the type of v before they are added up.
    tolerance={torch.bfloat16: (2**-7, 2e-3), torch.float16: (2**-10, 3e-4), torch.float32: (2e-5, 2e-5)},
)
