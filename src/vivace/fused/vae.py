"""Autoencoders, fused in place: norms with the SiLU behind them, biases with the sums behind them.

Every block keeps its module, its parameters and its call, so that whatever calls blocks works as before: encode and
decode, tiles, slices, strips, frames that come one by one. With gradients enabled the stock forwards run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock

from vivace.attention.native import NATIVE
from vivace.fused.elementwise import TORCH, Elementwise
from vivace.fused.unet_blocks import PictureParts, ResidualBlock
from vivace.one_off import give_class
from vivace.watch import hooked

PAIRS: Mapping[type, tuple[tuple[str, ...], str]] = {
    TemporalResnetBlock: (("norm1", "norm2"), "nonlinearity"),
    Encoder: (("conv_norm_out",), "conv_act"),
    Decoder: (("conv_norm_out",), "conv_act"),
    TemporalDecoder: (("conv_norm_out",), "conv_act"),
    wan.WanResidualBlock: (("norm1", "norm2"), "nonlinearity"),
    wan.WanEncoder3d: (("norm_out",), "nonlinearity"),
    wan.WanDecoder3d: (("norm_out",), "nonlinearity"),
    qwen.QwenImageResidualBlock: (("norm1", "norm2"), "nonlinearity"),
    qwen.QwenImageEncoder3d: (("norm_out",), "nonlinearity"),
    qwen.QwenImageDecoder3d: (("norm_out",), "nonlinearity"),
}
"""Modules whose norms are always followed by their activation: the names of both."""

CHANNEL_NORMS = (wan.WanRMS_norm, qwen.QwenImageRMS_norm)
CAUSAL = (wan.WanCausalConv3d, qwen.QwenImageCausalConv3d)
UPSAMPLES = (wan.WanUpsample, qwen.QwenImageUpsample)

Forward = Callable[..., torch.Tensor]


def check(vae: torch.nn.Module) -> str | None:
    """Why there is nothing to fuse in an autoencoder, or None."""
    if not any(True for _ in _forwards(vae, elementwise=TORCH)):
        return f"a {type(vae).__name__} has no norms that an activation follows"
    return None


def fuse(vae: torch.nn.Module, *, elementwise: Elementwise, undo: ExitStack) -> dict[str, int]:
    """Give the blocks of `vae` their fused forwards; returns how many of each kind."""
    counts: dict[str, int] = {}
    serving: set[int] = set()
    for kind, module, forward in list(_forwards(vae, elementwise=elementwise)):
        undo.callback(give_class(module, {"forward": _serving(type(module), forward, serving)}))
        serving.add(id(module))
        counts[kind] = counts.get(kind, 0) + 1
    undo.callback(serving.clear)
    return counts


def _forwards(vae: torch.nn.Module, *, elementwise: Elementwise) -> Iterator[tuple[str, torch.nn.Module, Forward]]:
    """What is fused, of which kind, and its new forward."""
    parts = PictureParts(attend=NATIVE.attend, elementwise=elementwise, layout=_layout(vae), undo=ExitStack())
    for module in vae.modules():
        if type(module) is ResnetBlock2D and _plain(module):
            yield "residual blocks", module, _residual(module, parts)
        elif type(module) in PAIRS:
            names, act = PAIRS[type(module)]
            norms = [getattr(module, name) for name in names]
            if isinstance(getattr(module, act), torch.nn.SiLU) and not _timed(module) and all(map(_known, norms)):
                yield from (("norms with their SiLU", norm, _normed(parts)) for norm in norms)
                yield "activations", getattr(module, act), lambda act, x: x
        elif type(module) in CAUSAL:
            yield "causal convolutions", module, _convolved
        elif type(module) in UPSAMPLES:
            yield "upsamplings", module, _upsampled


def _serving(stock: Any, forward: Forward, serving: Container[int]) -> Forward:
    @functools.wraps(stock.forward)
    def call(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # An offload's hook that came later keeps this for good, and may have been copied to another module.
        fused = id(module) in serving and not torch.is_grad_enabled()
        return (forward if fused else stock.forward)(module, *args, **kwargs)

    return call


def _layout(vae: torch.nn.Module) -> torch.memory_format:
    weights = (m.weight for m in vae.modules() if isinstance(m, torch.nn.Conv2d) and max(m.kernel_size) > 1)
    first = next(weights, None)
    last = first is not None and first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _plain(block: Any) -> bool:
    """Whether a residual block is a norm, SiLU and convolution, twice, and a sum."""
    return (
        isinstance(block.nonlinearity, torch.nn.SiLU)
        and not _timed(block)
        and block.time_embedding_norm in ("default", "group")
        and block.upsample is block.downsample is None
        and not (block.training and block.dropout.p)
    )


def _timed(block: Any) -> bool:
    return getattr(block, "time_emb_proj", None) is not None


def _known(norm: Any) -> bool:
    """Whether it is a norm that the kernels compute."""
    if type(norm) is torch.nn.GroupNorm:
        return norm.affine
    return type(norm) in CHANNEL_NORMS and norm.channel_first and not isinstance(norm.bias, torch.Tensor)


def _residual(block: Any, parts: PictureParts) -> Forward:
    fused, stock = ResidualBlock(block, parts=parts), type(block).forward
    inner = [block.norm1, block.conv1, block.norm2, block.conv2, block.conv_shortcut]

    def forward(block: Any, x: torch.Tensor, temb: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A hook (an offload's) brings the weights that are read here.
        if temb is not None or any(module is not None and hooked(module) for module in inner):
            return stock(block, x, temb, *args, **kwargs)
        return fused(x)

    return forward


def _normed(parts: PictureParts) -> Forward:
    def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(norm, torch.nn.GroupNorm):
            return parts.norm(norm, x, silu=True)
        return parts.elementwise.channel_norm(x, weight=norm.gamma.flatten(), silu=True)

    return forward


def _convolved(convolution: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """A causal convolution that pads only time itself; the convolution pads the picture without a copy of it."""
    width, _, height, _, time, _ = convolution._padding
    if cache_x is not None and time > 0:
        x = torch.cat([cache_x.to(x.device), x], dim=2)
        time -= cache_x.shape[2]
    x = F.pad(x, (0, 0, 0, 0, time, 0)) if time else x
    weight, bias, stride = convolution.weight, convolution.bias, convolution.stride
    return F.conv3d(x, weight, bias, stride, (0, height, width), convolution.dilation, convolution.groups)


def _upsampled(upsample: Any, x: torch.Tensor) -> torch.Tensor:
    """Pixels repeated in the type that they have: there is nothing to compute."""
    return F.interpolate(x, scale_factor=upsample.scale_factor, mode=upsample.mode)
