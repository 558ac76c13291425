"""Stable Video Diffusion's UNet, fused.

Its cross attention has one key, the embedding of the picture, so that its softmax is 1 whatever is asked: what comes
out is one vector a video, computed once per request, and queries and the norm in front of them are not needed. Frames
stay where they are in memory: convolutions over them are two-dimensional ones of a tall picture [B, C, F, H W], and
what works on rows works on them in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.unets.unet_3d_blocks import (
    CrossAttnDownBlockSpatioTemporal,
    CrossAttnUpBlockSpatioTemporal,
    DownBlockSpatioTemporal,
    UNetMidBlockSpatioTemporal,
    UpBlockSpatioTemporal,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput

from vivace.families.svd import split
from vivace.family import Split, State
from vivace.fused.contract import Fused
from vivace.fused.parts import Parts
from vivace.fused.sd_unet import Builder, Residual, layout_of, levels_of, step_of
from vivace.fused.unet_blocks import (
    PictureParts,
    PixelTransformer,
    ResidualBlock,
    SelfAttention,
    gated_mlp,
    norm_of,
    odd_attention,
)
from vivace.memory.joined import join

BLOCKS = (
    CrossAttnDownBlockSpatioTemporal,
    DownBlockSpatioTemporal,
    UNetMidBlockSpatioTemporal,
    UpBlockSpatioTemporal,
    CrossAttnUpBlockSpatioTemporal,
)


def check(denoiser: Any) -> str | None:
    """Why these blocks cannot be fused, or None."""
    for name, block in levels_of(denoiser):
        if type(block) not in BLOCKS:
            return f"{name} is a {type(block).__name__}"
        for inner in (*block.resnets, *getattr(block, "attentions", ())):
            mixer = inner.time_mixer
            if mixer.merge_strategy == "fixed" or mixer.switch_spatial_to_temporal_mix:
                return f"{name} mixes its frames in another way"
        for outer in getattr(block, "attentions", ()):
            for layer in (*outer.transformer_blocks, *outer.temporal_transformer_blocks):
                if (reason := _odd(layer)) is not None:
                    return f"{name} holds a {type(layer).__name__} with {reason}"
    return None


def _odd(layer: Any) -> str | None:
    if layer._chunk_size is not None or not getattr(layer, "is_res", True):
        return "a feed-forward in chunks, or of another width"
    if layer.attn2 is None or not isinstance(layer.ff.net[0], GEGLU):
        return "no cross attention or no GEGLU"
    return odd_attention(layer.attn1) or odd_attention(layer.attn2)


def declines(*, encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any) -> str | None:
    """Why one call must take the stock path, or None."""
    tokens = 1 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    return None if tokens == 1 else f"the call brings {tokens} tokens for the picture, not one"


def build(denoiser: Any, parts: Parts) -> Split:
    """The fused Split of a UNetSpatioTemporalConditionModel."""
    pictures = PictureParts(**vars(parts), layout=layout_of(denoiser))
    builder = VideoBuilder(denoiser, pictures)
    levels = [(name, block, builder.level(block)) for name, block in levels_of(denoiser)]
    return Split(
        prologue=partial(_prologue, split(denoiser).prologue, builder.time(), builder.frames()),
        blocks=tuple(step_of(name, block, level, denoiser) for name, block, level in levels),
        epilogue=partial(_epilogue, denoiser, pictures),
        once=partial(_picture, builder.crossings),
        once_inputs=("encoder_hidden_states",),
    )


class Times(NamedTuple):
    """What residual blocks read of a step."""

    frames: torch.Tensor  # [B F, sum], time embeddings for what works on frames
    videos: torch.Tensor  # [B, sum], the same for what works on videos
    gates: torch.Tensor  # [mixers, C], how much of what goes over frames is added


class Frames(NamedTuple):
    """What transformers read of a video."""

    picture: tuple[torch.Tensor, ...]  # [B F, C] each, what comes out of a cross attention
    places: tuple[torch.Tensor, ...]  # [B F, C] each, embeddings of a frame's place
    alphas: torch.Tensor  # [mixers], how much of the path over pixels is kept
    videos: int  # B


class VideoBuilder(Builder):
    """Builds the levels of a video UNet, and gathers what all of them share."""

    def __init__(self, denoiser: Any, parts: PictureParts) -> None:
        super().__init__(denoiser, parts)
        self.crossings: list[Any] = []  # cross attentions
        self._places: list[Any] = []  # transformers, each with an embedding of a frame's place
        self._mixes: list[torch.nn.Parameter] = []

    def residual(self, block: Any, *, summed: bool) -> Residual:
        frame, video = (self.embedded(inner) for inner in (block.spatial_res_block, block.temporal_res_block))
        return VideoResidualBlock(frame, video, mixer=self._mixer(block), parts=self.parts)

    def transformer(self, block: Any) -> PixelTransformer:
        place, mixer, layers = len(self._places), self._mixer(block), []
        self._places.append(block)
        for pixels, frames in zip(block.transformer_blocks, block.temporal_transformer_blocks, strict=True):
            crossing = len(self.crossings)
            self.crossings += [pixels.attn2, frames.attn2]
            layers.append(VideoLayer(pixels, frames, crossing=crossing, place=place, mixer=mixer, parts=self.parts))
        return PixelTransformer(block, layers=partial(_through, layers), parts=self.parts)

    def frames(self) -> Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """The kept shares of all mixers [mixers], and the embedding of every frame's place [F, C] by transformer."""
        mixes = join(self._mixes, self.parts.undo)

        def frames(number: int, *, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            places = torch.arange(number, device=mixes.device)
            embedded = (block.time_pos_embed(block.time_proj(places).to(dtype)) for block in self._places)
            return mixes.sigmoid().to(dtype), tuple(embedded)

        return frames

    def _mixer(self, block: Any) -> int:
        self._mixes.append(block.time_mixer.mix_factor)
        return len(self._mixes) - 1


class VideoResidualBlock:
    """A residual block on every frame, and one over the frames of which a share is added."""

    def __init__(self, frame: ResidualBlock, video: ResidualBlock, *, mixer: int, parts: PictureParts) -> None:
        self.frame, self.video, self.mixer, self.parts = frame, video, mixer, parts

    def __call__(self, x: torch.Tensor, times: Times, skip: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [B F, C, H, W], and a `skip` as `ResidualBlock` takes it."""
        x = self.frame(x, times.frames, skip)
        size, layout = x.shape, self.parts.layout
        tall = x.unflatten(0, (len(times.videos), -1)).flatten(3).transpose(1, 2)  # [B, C, F, H W]
        tall = tall.contiguous(memory_format=layout)
        y, bias = self.video.branch(tall, times.videos)
        gate = times.gates[self.mixer, : size[1]].expand(len(tall), -1)
        mixed = self.parts.elementwise.picture_sum(tall, y, bias=bias, gate=gate)
        return mixed.transpose(1, 2).unflatten(3, size[2:]).flatten(0, 1).contiguous(memory_format=layout)


class VideoLayer:
    """Attention and MLP over the pixels of every frame; from there a second path over the frames of every pixel."""

    def __init__(self, pixels: Any, frames: Any, *, crossing: int, place: int, mixer: int, parts: PictureParts) -> None:
        self.pixels, self.frames, self.parts = pixels, frames, parts
        self.crossing, self.place, self.mixer = crossing, place, mixer
        self.over_pixels = SelfAttention(pixels.attn1, parts=parts)
        self.over_frames = FrameAttention(frames.attn1, parts=parts)

    def __call__(self, tokens: torch.Tensor, video: Frames) -> torch.Tensor:
        """`tokens` [B F, H W, C]."""
        pixels, frames, elementwise = self.pixels, self.frames, self.parts.elementwise
        first, second = video.picture[self.crossing : self.crossing + 2]
        place = video.places[self.place]
        y = self.over_pixels(elementwise.norm(tokens, **norm_of(pixels.norm1, self.over_pixels.reader)))
        x, normed = elementwise.residual_norm(tokens, y, add=first, **_before(pixels.norm3, pixels.ff))
        y = gated_mlp(pixels.ff, normed, elementwise)
        # The path over frames starts from the stream with their places; the other one goes on without.
        placed, normed = elementwise.residual_norm(x, y, add=place, **_before(frames.norm_in, frames.ff_in))
        y = gated_mlp(frames.ff_in, normed, elementwise)
        x, normed = elementwise.residual_norm(placed, y, **norm_of(frames.norm1, self.over_frames.reader))
        y = self.over_frames(normed, videos=video.videos)
        x, normed = elementwise.residual_norm(x, y, add=second, **_before(frames.norm3, frames.ff))
        y = gated_mlp(frames.ff, normed, elementwise)
        return elementwise.blend(placed, x, y, alpha=video.alphas[self.mixer : self.mixer + 1], add=place)


class FrameAttention(SelfAttention):
    """The attention of a pixel's frames to each other."""

    def __call__(self, normed: Any, *, videos: int) -> torch.Tensor:
        qkv = self.reader(normed).unflatten(0, (videos, -1)).unflatten(-1, (3, self.attention.heads, -1))
        attended = torch.empty_like(qkv[:, :, :, 0], memory_format=torch.contiguous_format)  # [B, F, H W, heads, D]
        # By video: pixels are the batch here, and both together are not one dimension in memory.
        for video, out in zip(qkv, attended, strict=True):
            q, k, v = video.transpose(0, 1).unbind(2)
            out.copy_(self.attend(q, k, v).transpose(0, 1))
        return self.attention.to_out[0](attended.flatten(0, 1).flatten(2))


def _before(norm: Any, mlp: Any) -> dict[str, Any]:
    """The norm in front of an MLP, as keywords of the arithmetic."""
    return norm_of(norm, mlp.net[0].proj)


def _through(layers: list[VideoLayer], tokens: torch.Tensor, video: Frames) -> torch.Tensor:
    for layer in layers:
        tokens = layer(tokens, video)
    return tokens


def _picture(crossings: list[Any], encoder_hidden_states: torch.Tensor) -> Mapping[str, Any]:
    """What comes out of every cross attention [B, 1, C], from the embedding of the picture [B, 1, D]."""
    return {"picture": tuple(one.to_out[0](one.to_v(encoder_hidden_states)) for one in crossings)}


def _prologue(
    stock: Callable[..., State],
    time: Callable[..., torch.Tensor],
    frames: Callable[..., Any],
    *,
    once: Any,
    **kwargs: Any,
) -> State:
    state = stock(**kwargs)
    videos, number = state.context["shape"]
    times = time(state.context["emb"][::number])  # [B, sum]
    alphas, places = frames(number, dtype=state.x.dtype)
    context = {
        "time": Times(
            frames=times.repeat_interleave(number, dim=0),
            videos=times,
            gates=(1 - alphas)[:, None].repeat(1, max(place.shape[1] for place in places)),
        ),
        "text": Frames(
            picture=tuple(vector[:, 0].repeat_interleave(number, dim=0) for vector in once["picture"]),
            places=tuple(place.repeat(videos, 1) for place in places),
            alphas=alphas,
            videos=videos,
        ),
        "adapter": (),
        "control": None,
        **{name: state.context[name] for name in ("odd_size", "shape", "return_dict")},
    }
    return State(x=state.x, skips=state.skips, context=context)


def _epilogue(denoiser: Any, parts: PictureParts, state: State) -> Any:
    context = state.context
    x = denoiser.conv_out(parts.norm(denoiser.conv_norm_out, state.x, silu=True)).unflatten(0, context["shape"])
    return UNetSpatioTemporalConditionOutput(sample=x) if context["return_dict"] else (x,)


SVD = Fused(
    summary="cross attention to the one picture as a vector once per request, time embeddings of all blocks in one "
    "GEMM, q k v in one, residuals with the norms that follow, frames mixed where they lie",
    check=check,
    declines=declines,
    build=build,
)
