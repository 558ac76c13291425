"""A picture decoded strip by strip, exactly: the same pixels as whole, in a fraction of the memory, without seams.

Tiles that are decoded apart differ in tone, because group norm and attention see the whole picture. Here attention runs
whole, at the latents' size, where it is small. After it every layer goes over the picture in strips with the rows
around them that its convolutions read, and group norm first gathers its sums from all strips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D

LIMIT = 32 * 2**20
"""Bytes of one strip's input."""
STRIPS = 10
"""Strips that are on the device at a time: norms in fp32, their activations, what a convolution unfolds."""

Step = Callable[[torch.Tensor, slice], torch.Tensor]
"""A strip [B, C, R, W] and the rows it shows -> what the layer makes of it."""


def refuses(vae: Any) -> str | None:
    """Why a VAE cannot decode in strips, or None."""
    decoder = getattr(vae, "decoder", None)
    if type(decoder) is not Decoder:
        return f"a {type(vae).__name__} has another decoder"
    for block in decoder.up_blocks:
        if type(block) is not UpDecoderBlock2D or not all(
            isinstance(resnet, ResnetBlock2D) for resnet in block.resnets
        ):
            return f"its decoder has a {type(block).__name__}"
    return None


def work(vae: Any, *, width: int, height: int) -> int:
    """Bytes that a decode of one picture of that many pixels needs on the device, maps kept on the host."""
    decoder, scale = vae.decoder, 2 ** (len(vae.decoder.up_blocks) - 1)
    size = next(decoder.parameters()).dtype.itemsize
    latent = decoder.conv_in.out_channels * (width // scale) * (height // scale)
    return 6 * latent * size + STRIPS * LIMIT + 2 * 3 * width * height * size


def map_bytes(vae: Any, *, width: int, height: int) -> int:
    """Bytes of the two largest maps, which stay on the device where there is room for them."""
    decoder = vae.decoder
    size = next(decoder.parameters()).dtype.itemsize
    widest = max(resnet.in_channels for resnet in decoder.up_blocks[-1].resnets)
    return 3 * widest * width * height * size


@torch.no_grad()
def decode(vae: Any, z: torch.Tensor, *, store: torch.device | None = None) -> torch.Tensor:
    """`vae.decode(z)` of latents `[B, C, h, w]` as pixels `[B, 3, H, W]`. Maps are kept on `store`, or where z is."""
    pictures = []
    for one in z.split(1):
        if vae.post_quant_conv is not None:
            one = vae.post_quant_conv(one)
        pictures.append(_decode(vae.decoder, one, store or z.device))
    return torch.cat(pictures)


def _decode(decoder: Any, z: torch.Tensor, store: torch.device) -> torch.Tensor:
    device = z.device
    x = decoder.mid_block(decoder.conv_in(z)).to(store)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, device)
        for upsampler in block.upsamplers or ():
            x = _sweep(x, lambda part, rows, layer=upsampler: layer(part), device, scale=2)
    norm = _normed(decoder.conv_norm_out, x, device)
    return _sweep(x, lambda part, rows: decoder.conv_out(norm(part)), device).to(device)


def _resnet(resnet: Any, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    first = _normed(resnet.norm1, x, device)
    h = _sweep(x, lambda part, rows: resnet.conv1(first(part)), device)
    second = _normed(resnet.norm2, h, device)

    def finish(part: torch.Tensor, rows: slice) -> torch.Tensor:
        made = resnet.conv2(second(part))
        shortcut = x[:, :, rows].to(device)
        if resnet.conv_shortcut is not None:
            shortcut = resnet.conv_shortcut(shortcut)
        return (shortcut + made) / resnet.output_scale_factor

    # The rows of x that a strip has read are free for its result.
    return _sweep(h, finish, device, into=x if resnet.conv_shortcut is None else None)


def _sweep(
    x: torch.Tensor, step: Step, device: torch.device, *, scale: int = 1, into: torch.Tensor | None = None
) -> torch.Tensor:
    """A layer over a map [B, C, H, W], strip by strip with a row more on either side; its result in x's place."""
    height, out = x.shape[2], into
    rows = _rows(x)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(0, top - 1), min(height, bottom + 1)
        made = step(x[:, :, first:last].to(device), slice(first, last))
        made = made[:, :, (top - first) * scale : (bottom - first) * scale]
        if out is None:
            out = torch.empty(x.shape[0], made.shape[1], height * scale, made.shape[3], device=x.device, dtype=x.dtype)
        out[:, :, top * scale : bottom * scale] = made
    assert out is not None
    return out


def _normed(norm: torch.nn.GroupNorm, x: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The group norm of the whole map and the SiLU behind it, for any strip of it."""
    batch, channels, height, width = x.shape
    total = torch.zeros(2, batch, norm.num_groups, device=device, dtype=torch.float64)
    for top in range(0, height, rows := _rows(x)):
        part = x[:, :, top : top + rows].to(device).float().reshape(batch, norm.num_groups, -1)
        total += torch.stack((part.sum(-1), part.square().sum(-1))).double()
    count = channels // norm.num_groups * height * width
    mean = total[0] / count
    deviation = (total[1] / count - mean.square() + norm.eps).rsqrt()
    spread = channels // norm.num_groups
    scale = deviation.float().repeat_interleave(spread, dim=1) * norm.weight.float()
    shift = norm.bias.float() - mean.float().repeat_interleave(spread, dim=1) * scale

    def apply(part: torch.Tensor) -> torch.Tensor:
        return F.silu((part.float() * scale[..., None, None] + shift[..., None, None]).to(part.dtype))

    return apply


def _rows(x: torch.Tensor) -> int:
    return max(1, LIMIT // (x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()))
