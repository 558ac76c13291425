"""A LoRA's linear in as few launches as its maths takes.

The denoiser of SDXL has 560 of them. PEFT's own forward casts its input twice and its weights every time, scales and
adds apart, and leaves eight nodes to the backward pass: a GPU waits for the host then.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from vivace.autocast import autocast_type


class Product(torch.autograd.Function):
    """x W^T + bias + scale x A^T B^T, with gradients of x, A and B; all products in the type of the frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [..., I]
        down: torch.Tensor,  # A, [R, I]
        up: torch.Tensor,  # B, [O, R]
        weight: torch.Tensor,  # W, [O, I]
        bias: torch.Tensor | None,
        scale: float,
        casts: tuple[torch.Tensor, torch.Tensor] | None,  # A and B in the type of W, where they lie ready
    ) -> torch.Tensor:
        kind = weight.dtype
        first, second = casts or (down.to(kind), up.to(kind))
        rows = x.reshape(-1, x.shape[-1]).to(kind)
        low = rows @ first.t()
        own = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        found = torch.addmm(own, low, second.t(), alpha=scale)
        ctx.save_for_backward(rows, low)
        # Parameters stand still until the backward pass: to save them would have checkpointing handle each one.
        ctx.weights, ctx.casts, ctx.scale, ctx.shape, ctx.kind = (down, up, weight), casts, scale, x.shape, x.dtype
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low = ctx.saved_tensors
        down, up, weight = ctx.weights
        kind = weight.dtype
        first, second = ctx.casts or (down.to(kind), up.to(kind))
        out = gradient.reshape(-1, gradient.shape[-1]).to(kind)
        inner = out @ second
        found = None
        if ctx.needs_input_grad[0]:
            found = torch.addmm(out @ weight, inner, first, alpha=ctx.scale).view(ctx.shape).to(ctx.kind)
        both = [(inner.t() @ rows).to(down.dtype), (out.t() @ low).to(up.dtype)]
        if ctx.scale != 1.0:
            both = [one * ctx.scale for one in both]
        return found, *both, None, None, None, None


class LowRank(Linear):
    """PEFT's layer over a frozen linear, without dropout and of one adapter: `Product`, outside of autocast."""

    casts: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or autocast_type(x.device) is not None:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base: Any = self.base_layer
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return Product.apply(x, down, up, base.weight, base.bias, self.scaling[name], self.casts)


def cast_at_once(student: nn.Module) -> None:
    """Have a student, whenever it is called, cast all A and B in a few launches, not each one where it is used.

    For weights that stay where they are: the shards of several processes come and go.
    """
    weights: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for layer in student.modules():
        if not isinstance(layer, LowRank):
            continue
        (name,) = layer.active_adapters
        base: Any = layer.base_layer
        own: Any = (layer.lora_A[name].weight, layer.lora_B[name].weight)
        if own[0].dtype != base.weight.dtype:
            layer.casts = tuple(one.detach().to(base.weight.dtype) for one in own)  # type: ignore[assignment]
            weights.extend(own)
            copies.extend(layer.casts)

    @torch.no_grad()
    def cast(*_: Any) -> None:
        torch._foreach_copy_(copies, weights)

    if copies:
        student.register_forward_pre_hook(cast)
