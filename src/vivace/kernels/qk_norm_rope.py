"""RMSNorm of q and k (of each head, or across all), rotary embedding, and q, k, v written where attention reads them.

It reads the output of one stream's fused QKV product and writes at an offset into the joint sequence, so that text and
image streams are never concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vivace.kernels.kernel import Case, Draw, Kernel, register
from vivace.kernels.language import jit, power_of_two, tl
from vivace.kernels.row import E4M3_LIMIT, FORMATS, load_columns, norm_ref, normalize, tokens_of, within_e4m3

SCHEMA = (
    "qk_norm_rope(Tensor qkv, Tensor(a!) q, Tensor(b!) k, Tensor(c!)? v, Tensor(d!)? v_scale, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? cos, Tensor? sin, int offset, float eps) -> ()"
)
LIMIT = FORMATS["fp8"].limit


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbours (0, 1), (2, 3), ... of `x` [B, S, H, D] by the angles of `cos` and `sin` [(B,) S, D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    offset: int,
    eps: float,
) -> None:
    """The operation in torch, in fp32 between one load and one store."""
    heads = qkv.unflatten(-1, (3, q.shape[2], q.shape[3])).float().unbind(2)
    for x, out, weight in zip(heads, (q, k), (q_weight, k_weight), strict=False):
        if weight is not None:
            grouped = x.flatten(2).unflatten(-1, (-1, len(weight)))  # [B, S, H, D], or [B, S, 1, H D]
            x = (norm_ref(grouped, eps, "rms") * weight.float()).view(x.shape)
        x = _rotated(x, cos, sin) if cos is not None and sin is not None else x
        x = x.clamp(-LIMIT, LIMIT) if out.dtype == torch.float8_e4m3fn else x
        out[:, offset : offset + qkv.shape[1]] = x.to(out.dtype)
    if v is not None:
        v[:, offset : offset + qkv.shape[1]] = heads[2].to(v.dtype)
    if v_scale is not None:
        v_scale.copy_(torch.maximum(v_scale, heads[2].abs().amax((1, 3)) / LIMIT))


@jit
def _write_head(
    x, weight, cos, sin, out, token, cos_token, cos_pair, sin_token, sin_pair, rows, columns, mask, heads, depth, head,
    eps, ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's heads `x` [H, D] (fp32), normalised where there is a weight, rotated where there are angles."""
    if weight is not None:
        if ACROSS:
            factors = tl.load(weight + rows * depth + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (heads * depth) + eps) * factors
        else:
            x = normalize(x, mask, depth, eps, "rms") * load_columns(weight, columns, columns < depth)
    if cos is not None:
        pairs = tl.arange(0, BLOCK // 2)
        inside = pairs < depth // 2
        c = load_columns(cos + token * cos_token, pairs * cos_pair, inside)
        s = load_columns(sin + token * sin_token, pairs * sin_pair, inside)
        even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
        x = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (ROWS, BLOCK))
    kind: tl.constexpr = out.dtype.element_ty
    if kind == tl.float8e4nv:
        x = within_e4m3(x)
    tl.store(out + rows.to(tl.int64) * head + columns[None, :], x.to(kind), mask=mask)


@jit(do_not_specialize=("offset",))
def _qk_norm_rope_kernel(
    qkv, q, k, v, v_scale, q_weight, k_weight, cos, sin,
    offset, heads, depth, qkv_batch, qkv_token,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair, eps,
    ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)
    mask = (rows < heads) & (columns < depth)[None, :]
    at = qkv + batch * qkv_batch + token * qkv_token + (part * heads + rows) * depth + columns[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    to = token + offset
    if cos is not None:
        cos += batch * cos_batch
        sin += batch * sin_batch
    if part == 0:
        _write_head(
            x, q_weight, cos, sin, q + batch * q_batch + to * q_token,
            token, cos_token, cos_pair, sin_token, sin_pair, rows, columns, mask, heads, depth, q_head,
            eps, ACROSS, ROWS, BLOCK,
        )  # fmt: skip
    elif part == 1:
        _write_head(
            x, k_weight, cos, sin, k + batch * k_batch + to * k_token,
            token, cos_token, cos_pair, sin_token, sin_pair, rows, columns, mask, heads, depth, k_head,
            eps, ACROSS, ROWS, BLOCK,
        )  # fmt: skip
    else:
        if v is not None:
            at = v + batch * v_batch + to * v_token + rows.to(tl.int64) * v_head + columns[None, :]
            tl.store(at, x.to(v.dtype.element_ty), mask=mask)
        if v_scale is not None:
            fits = tl.max(tl.abs(x), 1, keep_dims=True) / E4M3_LIMIT  # pyright: ignore[reportOperatorIssue]
            # After a few tokens hardly one raises it, and a look is cheaper than an atomic operation.
            scale = v_scale + batch * heads + rows
            raises = (rows < heads) & (fits > tl.load(scale, mask=rows < heads, other=0.0))
            tl.atomic_max(scale, fits, mask=raises)


def _launch(
    qkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    offset: int,
    eps: float,
) -> None:
    batch, tokens, _ = qkv.shape
    heads, depth = q.shape[2], q.shape[3]
    rows, block = power_of_two(heads), power_of_two(depth)
    _qk_norm_rope_kernel[(tokens, batch, 2 if v is None and v_scale is None else 3)](
        qkv, q, k, v, v_scale, q_weight, k_weight, cos, sin,
        offset, heads, depth, qkv.stride(0), qkv.stride(1),
        *q.stride()[:3], *k.stride()[:3], *((0, 0, 0) if v is None else v.stride()[:3]),
        *_steps(cos), *_steps(sin), eps,
        ACROSS=q_weight is not None and heads > 1 and len(q_weight) > depth,
        ROWS=rows, BLOCK=block, num_warps=max(1, min(8, rows * block // 1024)),
    )  # fmt: skip


def _steps(table: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a table by sample, token and pair; samples may share it."""
    return (0, 0, 0) if table is None else table.stride() if table.ndim == 3 else (0, *table.stride())


_op = register(SCHEMA, reference=qk_norm_rope_ref, launch=_launch)


def qk_norm_rope(
    qkv: torch.Tensor,
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    offset: int = 0,
    eps: float = 1e-6,
) -> None:
    """Writes tokens `offset : offset + S` of `q`, `k` and `v` [B, S_total, H, D] from `qkv` [B, S, 3 H D].

    Where attention wants [B, H, S_total, D], pass `.transpose(1, 2)` of it. With `q_weight` and `k_weight` [D] each
    head of q and k is RMS-normalised, with [H D] all heads of a token together; with `cos` and `sin` [S, D / 2], or
    [B, S, D / 2] where samples have tables of their own, their neighbours (0, 1), (2, 3), ... are rotated (a table that
    holds each angle twice goes in as `cos[:, ::2]`). Without `v` it is left where it is: a lone stream can read it from
    `qkv`. q and k may be in e4m3, whose limit their weights have to respect. `v_scale` [B, H] fp32 is raised to the
    scales with which the heads of v fit e4m3. Raises ValueError when the sizes do not fit, or a last dimension is not
    contiguous.
    """
    qkv = tokens_of(qkv, "qkv")
    if qkv.shape[-1] != 3 * q.shape[-1] * q.shape[-2] or offset + qkv.shape[1] > q.shape[1]:
        raise ValueError(
            f"qkv of {tuple(qkv.shape)} at offset {offset} does not fit q of {tuple(q.shape)}; "
            "qkv is [B, S, 3 * H * D] and q is [B, S_total, H, D] with offset + S <= S_total"
        )
    if any(t is not None and t.stride(-1) != 1 for t in (q, k, v)):
        raise ValueError("q, k and v must be contiguous in their last dimension; give views that keep D innermost")
    if v_scale is not None and (v_scale.shape != (len(qkv), q.shape[2]) or v_scale.dtype != torch.float32):
        raise ValueError(f"v_scale must be [{len(qkv)}, {q.shape[2]}] float32, got {list(v_scale.shape)}")
    for name, weight in {"q_weight": q_weight, "k_weight": k_weight}.items():
        if weight is not None and weight.shape not in ((q.shape[-1],), (q.shape[-2] * q.shape[-1],)):
            raise ValueError(
                f"{name} must be [{q.shape[-1]}], one a channel of a head, or [{q.shape[-2] * q.shape[-1]}], one a "
                f"channel, got {list(weight.shape)}"
            )
    for name, table in {"cos": cos, "sin": sin}.items():
        allowed = [qkv.shape[1], q.shape[-1] // 2]
        if table is not None and list(table.shape) not in (allowed, [len(qkv), *allowed]):
            raise ValueError(f"{name} must be {allowed}, [S, D / 2], got {list(table.shape)}; give this stream's rows")
    _op(qkv, q, k, v, v_scale, q_weight, k_weight, cos, sin, offset, eps)


def _make(
    draw: Draw,
    *,
    batch: int = 1,
    tokens: int,
    heads: int,
    depth: int,
    norm: bool = True,
    across: bool = False,
    rope: bool = True,
    rope_each: bool = False,
    write_v: bool = True,
    before: int = 0,
    after: int = 0,
    heads_first: bool = False,
    fp8: bool = False,
    pad: int = 0,
) -> dict[str, Any]:
    """A joint sequence with `before` and `after` tokens of another stream; twice-held angles with `pad`.

    With `fp8` q and k in e4m3, and the scales of v.
    """
    total = before + tokens + after
    joint = [
        draw.empty(batch, heads, total, depth).transpose(1, 2)
        if heads_first
        else draw.empty(batch, total, heads, depth)
        for _ in range(3)
    ]
    angles = (*([batch] if rope_each else []), tokens, depth if pad else depth // 2)
    cos, sin = (draw(*angles, dtype=torch.float32) if rope else None for _ in range(2))
    return {
        "qkv": draw(batch, tokens, 3 * heads * depth, pad=pad),
        "q": joint[0].to(torch.float8_e4m3fn) if fp8 else joint[0],
        "k": joint[1].to(torch.float8_e4m3fn) if fp8 else joint[1],
        "v": joint[2] if write_v else None,
        "v_scale": torch.full((batch, heads), 1e-12, device=draw.device) if fp8 else None,
        "q_weight": draw(heads * depth if across else depth) if norm else None,
        "k_weight": draw(heads * depth if across else depth) if norm else None,
        "cos": cos[..., ::2] if pad and cos is not None else cos,
        "sin": sin[..., ::2] if pad and sin is not None else sin,
        "offset": before,
        "eps": 1e-6,
    }


def _bytes_moved(arguments: Mapping[str, Any], results: list[torch.Tensor]) -> int:
    """q, k (and v where it is read) once in, what is written of them once out, and the angles."""
    qkv, angles = arguments["qkv"], [arguments[name] for name in ("cos", "sin") if arguments[name] is not None]
    part = qkv.numel() // 3
    written = [t.element_size() for t in results if t.ndim == 4]
    read = 3 if arguments["v_scale"] is not None else len(written)
    return part * (read * qkv.element_size() + sum(written)) + sum(t.numel() * t.element_size() for t in angles)


_FLUX = {"heads": 24, "depth": 128}
_SD3 = {"batch": 2, "heads": 24, "depth": 64, "rope": False}

KERNEL = Kernel(
    name="qk_norm_rope",
    reference=qk_norm_rope_ref,
    launch=_launch,
    op=_op,
    make=_make,
    written=("q", "k", "v", "v_scale"),
    bytes_moved=_bytes_moved,
    cases=(
        Case("head size 128 after text", {"tokens": 5, "heads": 3, "depth": 128, "before": 7}),
        Case("head size 64, no rope, two samples", {"batch": 2, "tokens": 9, "heads": 4, "depth": 64, "rope": False}),
        Case("head size 72, heads first", {"tokens": 5, "heads": 2, "depth": 72, "after": 3, "heads_first": True}),
        Case("head size 32, no norm", {"batch": 2, "tokens": 7, "heads": 6, "depth": 32, "norm": False}),
        Case("views, angles held twice", {"batch": 2, "tokens": 5, "heads": 2, "depth": 64, "pad": 64}),
        Case(
            "every sample its own angles",
            {"batch": 2, "tokens": 5, "heads": 2, "depth": 32, "rope_each": True, "pad": 32, "after": 2},
        ),
        Case("across heads", {"batch": 2, "tokens": 5, "heads": 3, "depth": 32, "across": True, "write_v": False}),
        Case("v left in place", {"tokens": 5, "heads": 2, "depth": 128, "write_v": False}),
        Case("in fp8 after text", {"batch": 2, "tokens": 5, "heads": 3, "depth": 64, "before": 4, "fp8": True}),
        Case("in fp8, v left", {"tokens": 37, "heads": 2, "depth": 32, "across": True, "write_v": False, "fp8": True}),
    ),
    bench=(
        Case("FLUX 1024² image", {**_FLUX, "tokens": 4096, "before": 512}),
        Case("FLUX 1024² text", {**_FLUX, "tokens": 512, "after": 4096, "rope": False}),
        Case("FLUX 1024² single", {**_FLUX, "tokens": 4608, "pad": 12288, "write_v": False}),
        Case("FLUX 1024² single, fp8", {**_FLUX, "tokens": 4608, "write_v": False, "fp8": True}),
        Case("SD3.5-medium 1024² b2 image", {**_SD3, "tokens": 4096, "after": 333}),
        Case("Wan 14B 480p", {"tokens": 32760, "heads": 40, "depth": 128, "across": True, "write_v": False}),
        Case("built-in b2", {"batch": 2, "tokens": 256, "heads": 6, "depth": 32, "rope": False, "after": 78}),
    ),
)
