"""The arithmetic between the large products of a block, in two forms: torch operations, and this package's kernels.

A fused block asks for what it means and is given the form that suits its device. Streams are [B, S, D] with contiguous
rows; gates, scales and shifts are one vector a sample, [B, D], or a token, [B, S, D], and may be a `Sum`; pictures are
[B, C, H, W] in either order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vivace.fused.stack import Stack
from vivace.kernels.activate import activate, activation_ref
from vivace.kernels.blend import blend
from vivace.kernels.channel_norm_silu import channel_norm_silu
from vivace.kernels.gate_residual import gate_residual
from vivace.kernels.glu import glu
from vivace.kernels.group_norm_silu import group_norm_silu, join_norm_silu
from vivace.kernels.join_activate import join_activate
from vivace.kernels.norm_modulate import norm_modulate
from vivace.kernels.qk_norm_rope import qk_norm_rope
from vivace.kernels.residual_norm import residual_norm
from vivace.kernels.row import HeadScaled, Sum, with_room


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """One form of the arithmetic. Keywords left out are None, and what they would do is left out too.

    `quantize` is what the linear that reads the result `takes`: kernels make it in the same pass, and torch operations
    leave it to the linear. `room` is how many columns more each row of a norm is to have behind it, for adapters.
    """

    norm: Callable[..., Any]
    """`(x, *, weight, bias, scale, shift, eps=1e-6, kind="layer", quantize, room=0)`: the norm `* weight + bias`,
    modulated."""

    residual: Callable[..., Any]
    """`(x, y, *, gate)`: `x + gate * y`."""

    residual_norm: Callable[..., Any]
    """`(x, y, *, y_bias, gate, add, y_weight, after, also, also_gate, **norm)`: h = `x + gate * (y + y_bias) + add +
    also_gate * also` with `add` and `also_gate` [B, D] (of y's RMSNorm, with `y_weight`), and the norm of h; h comes
    back in memory of its own, with `after` [D] added."""

    heads: Callable[..., None]
    """`(qkv, *, q, k, v, v_scale, q_weight, k_weight, cos, sin, offset=0, eps=1e-6)`: as `qk_norm_rope`."""

    linear_gelu: Callable[..., Any]
    """`(linear, x, *, quantize)`: GELU, in its tanh form, of `linear(x)`."""

    glu: Callable[..., Any]
    """`(a, b, *, kind, quantize)`: `a * activation(b)`; "gelu" is the exact one."""

    join: Callable[..., Any]
    """`(a, b, *, times, kind="gelu_tanh", quantize)`: `activation(b) * times` beside `a` (rows, or e4m3 heads)."""

    picture_norm: Callable[..., torch.Tensor]
    """`(x, *, groups, weight, bias, eps=1e-5, silu=True, add)`: GroupNorm of `x + add` with `add` [B, C], then SiLU."""

    join_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """`(x, *, y, y_bias, after, skip, groups, weight, bias, eps=1e-5, silu=True)`: `picture_norm` of h = `x + y +
    y_bias`, or of the channels of `x` and `skip`; and h in memory of its own, with `after` [C] added."""

    channel_norm: Callable[..., torch.Tensor]
    """`(x, *, weight, silu=True)`: RMSNorm of `x` [B, C, ...] over C with `weight` [C], then SiLU."""

    picture_sum: Callable[..., torch.Tensor]
    """`(x, y, *, bias, gate)`: `x + gate * (y + bias)` of pictures in the same order; `bias` [C], `gate` [B, C]."""

    blend: Callable[..., torch.Tensor]
    """`(x, y, z, *, alpha, add)`: `alpha * (x - add) + (1 - alpha) * (y + z)` with `alpha` [1] and `add` [B, D]."""

    late_bias: bool
    """A convolution's bias is a pass of its own, and slows a linear product's: the sum that follows should add it."""


def _vector(vector: torch.Tensor | Sum) -> torch.Tensor:
    """[B, 1, D] or [B, S, D]."""
    if isinstance(vector, Sum):
        vector = vector.own.to(torch.promote_types(vector.own.dtype, torch.float32)) + vector.base
    return vector if vector.ndim == 3 else vector.unsqueeze(1)


def _norm(x, *, weight=None, bias=None, scale=None, shift=None, eps=1e-6, kind="layer", quantize=None, room=0):
    scale, shift = (None if vector is None else _vector(vector) for vector in (scale, shift))
    # Weights or modulation of a wider type than the stream ask for all of it in that type.
    wide, size = x.to(next((t.dtype for t in (weight, scale) if t is not None), x.dtype)), x.shape[-1:]
    y = F.layer_norm(wide, size, weight, bias, eps) if kind == "layer" else F.rms_norm(wide, size, weight, eps)
    if scale is not None:
        y = y * (scale + 1) if shift is None else torch.addcmul(shift, y, scale + 1)
    return with_room(y.shape, room, like=x).copy_(y) if room else y.to(x.dtype)


def _residual(x, y, *, gate=None):
    return x + y if gate is None else torch.addcmul(x, _vector(gate), y).to(x.dtype)


def _residual_norm(
    x, y, *, y_bias=None, gate=None, add=None, y_weight=None, after=None, also=None, also_gate=None, eps=1e-6, **norm
):
    y = y if y_bias is None else y + y_bias
    y = y if y_weight is None else F.rms_norm(y, y.shape[-1:], y_weight, eps)
    h = _residual(x, y, gate=gate)
    h = h if add is None else h.add_(add.unsqueeze(1))
    h = h if also is None else _residual(h, also, gate=also_gate)
    return h if after is None else h + after, _norm(h, eps=eps, **norm)


def _heads(qkv, *, q, k, v=None, v_scale=None, offset=0, **options):
    if v_scale is not None:
        # The 8-bit form has no quicker spelling in torch than the kernel's reference.
        return qk_norm_rope(qkv, q=q, k=k, v=v, v_scale=v_scale, offset=offset, **options)
    return _heads_as_they_are(qkv, q=q, k=k, v=v, offset=offset, **options)


def _heads_as_they_are(qkv, *, q, k, v, offset, q_weight=None, k_weight=None, cos=None, sin=None, eps=1e-6):
    tokens = slice(offset, offset + qkv.shape[1])
    q_in, k_in, v_in = qkv.unflatten(-1, (3, *q.shape[2:])).unbind(2)
    # [(B,) S, 1, D / 2]
    turn = None if cos is None or sin is None else torch.complex(_wide(cos), _wide(sin)).unsqueeze(-2)
    for x, weight, out in ((q_in, q_weight, q), (k_in, k_weight, k)):
        if weight is not None:
            x = F.rms_norm(x.flatten(2).unflatten(-1, (-1, len(weight))), weight.shape, weight, eps).view(x.shape)
        out[:, tokens] = x if turn is None else _turned(x, turn)
    if v is not None:
        v[:, tokens] = v_in


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    # There are no 16-bit complex numbers to speak of.
    return x.float() if x.dtype.itemsize == 2 else x


def _linear_gelu(linear, x, *, quantize=None):
    return F.gelu(linear(x), approximate="tanh")


def _glu(a, b, *, kind, quantize=None):
    return activation_ref(b, kind).mul_(a)


def _join(a, b, *, times=None, kind="gelu_tanh", quantize=None):
    y = activation_ref(b, kind)
    a = a.dense().to(b.dtype) if isinstance(a, HeadScaled) else a
    return torch.cat((a, y if times is None else y.mul_(times)), dim=-1)


def _picture_norm(x, *, groups, weight, bias, eps=1e-5, silu=True, add=None):
    y = F.group_norm(x if add is None else x + add[:, :, None, None], groups, weight, bias, eps)
    return F.silu(y, inplace=True) if silu else y


def _join_norm(x, *, y=None, y_bias=None, after=None, skip=None, **norm):
    h = _picture_sum(x, y, bias=y_bias) if skip is None else torch.cat((x, skip), dim=1)
    return _picture_norm(h, **norm), h if after is None else h + after[:, None, None]


def _channel_norm(x, *, weight, silu=True):
    # In the order of the stock norms, and of their roundings.
    y = F.normalize(_wide(x), dim=1).to(x.dtype)
    y = y * x.shape[1] ** 0.5 * weight[(..., *[None] * (x.ndim - 2))]
    return F.silu(y, inplace=True) if silu else y


def _picture_sum(x, y, *, bias=None, gate=None):
    y = y if bias is None else y + bias[:, None, None]
    return x + y if gate is None else torch.addcmul(x, gate[:, :, None, None], y)


def _blend(x, y, z, *, alpha, add):
    return torch.lerp(y + z, x - add.unsqueeze(1), alpha)


TORCH = Elementwise(
    norm=_norm,
    residual_norm=_residual_norm,
    residual=_residual,
    heads=_heads,
    linear_gelu=_linear_gelu,
    glu=_glu,
    join=_join,
    picture_norm=_picture_norm,
    join_norm=_join_norm,
    channel_norm=_channel_norm,
    picture_sum=_picture_sum,
    blend=_blend,
    late_bias=False,
)


def _linear_activate(linear, x, *, quantize=None):
    return activate(linear(x), quantize=quantize)


def _linear_gelu_epilogue(linear, x, *, quantize=None):
    # cuBLASLt applies the GELU (its tanh form) before it stores the product: a pass over the widest tensor less.
    if isinstance(linear, Stack) and quantize is None and (rows := linear.gelu(x)) is not None:
        return rows
    if type(linear) is not torch.nn.Linear or linear.bias is None or quantize is not None:
        return _linear_activate(linear, x, quantize=quantize)
    rows = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], -1)


def _picture_sum_rows(x, y, *, bias=None, gate=None):
    if not x.is_contiguous(memory_format=torch.channels_last):
        return _picture_sum(x, y, bias=bias, gate=gate)
    rows, other = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, y))  # [B, H W, C], views
    summed = gate_residual(rows, other, bias=bias, gate=gate)
    return summed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


KERNELS = Elementwise(
    norm=norm_modulate,
    residual_norm=residual_norm,
    residual=gate_residual,
    heads=qk_norm_rope,
    linear_gelu=_linear_activate,
    glu=glu,
    join=join_activate,
    picture_norm=group_norm_silu,
    join_norm=join_norm_silu,
    channel_norm=channel_norm_silu,
    picture_sum=_picture_sum_rows,
    blend=blend,
    late_bias=True,
)

CUDA = replace(KERNELS, linear_gelu=_linear_gelu_epilogue)


def elementwise_for(device: torch.device) -> Elementwise:
    """The form for a device; "meta" stands for a GPU, whose kernels are to be compiled ahead."""
    return CUDA if device.type in ("cuda", "meta") else TORCH
