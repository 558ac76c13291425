"""torch's own scaled dot product attention: the kernel by rule, or one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vivace.attention.backend import Backend


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row: on GPUs of compute capability `sm`, without a mask and from `sequence` keys on, SDPA takes `kernel`."""

    sm: tuple[int, int]
    sequence: int
    kernel: SDPBackend


# H200, 24 heads of 128 and 10 of 64, 4,096 to 32,760 tokens: cuDNN 464 to 647 TFLOP/s, flash 243 to 366. Where no row
# matches, the choice stays torch's.
RULES: tuple[Rule, ...] = (Rule(sm=(9, 0), sequence=1024, kernel=SDPBackend.CUDNN_ATTENTION),)


def settle_order(device: torch.device) -> None:
    """Lets torch put its kernels in its own order, with cuDNN first where it trusts it.

    It does so when it first chooses one. Were that inside a context with an order, the one from before would be put
    back at its end, and every later call of the process without a rule would take another kernel than torch means to.
    """
    q = torch.empty(1, 1, 16, 16, device=device, dtype=torch.float16)
    torch._fused_sdp_choice(q, q, q)


_16BIT = frozenset({torch.float16, torch.bfloat16})


def rule_for(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> Rule | None:
    """The first rule that matches q `[B, Sq, H, D]` and k `[B, Sk, H, D]`, or None: torch chooses."""
    if mask is not None or not q.is_cuda or q.dtype not in _16BIT or q.shape[-1] > 128:
        return None
    sm = torch.cuda.get_device_capability(q.device)
    return next((rule for rule in RULES if rule.sm == sm and k.shape[1] >= rule.sequence), None)


def _sdpa(q, k, v, mask, scale):
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)


def _native(q, k, v, *, mask=None, scale=None):
    rule = rule_for(q, k, mask)
    if rule is None:
        return _sdpa(q, k, v, mask, scale)
    # Flash and efficient stand behind the first choice for the odd shape it does not take.
    order = [rule.kernel, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return _sdpa(q, k, v, mask, scale)


def attend_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, k, v `[B, S, H, D]`, and the natural log-sum-exp of its scores, `[B, Sq, H]` in fp32."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
    elif (rule := rule_for(q, k, None)) and rule.kernel is SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads, None, True, scale=scale)
    elif q.dtype in _16BIT:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*heads, None, True, scale=scale)
    # The efficient kernel rounds the queries up.
    lse = lse.reshape(*lse.shape[:2], -1)[..., : q.shape[1]]
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def _only(kernel: SDPBackend):
    def attend(q, k, v, *, mask=None, scale=None):
        with sdpa_kernel(kernel):
            return _sdpa(q, k, v, mask, scale)

    return attend


NATIVE = Backend(
    name="native",
    attend=_native,
    devices=frozenset({"cuda", "cpu", "mps", "xpu"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    masks=True,
)
CUDNN = Backend(name="cudnn", attend=_only(SDPBackend.CUDNN_ATTENTION), masks=True)
EFFICIENT = Backend(
    name="efficient",
    attend=_only(SDPBackend.EFFICIENT_ATTENTION),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    masks=True,
)
