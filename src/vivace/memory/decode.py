"""A VAE whose decode does not lose the latents: whole, else in parts, else kept in a file."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vivace.errors import InputError
from vivace.memory import strips
from vivace.one_off import give_class

logger = logging.getLogger(__name__)

FRAMES = 4
"""Frames at a time, of a VAE that takes those of a video as a batch and looks across them."""

Way = tuple[str, Callable[[Any, torch.Tensor], torch.Tensor]]


def rescue(
    vae: Any,
    *,
    in_strips: bool = False,
    room: Callable[[], int] | None = None,
    release: Callable[[], None] | None = None,
) -> Callable[[], None]:
    """Let `vae.decode` go on by smaller means when the device's memory does not suffice; returns the undo.

    `in_strips` begins with strips. `room` says how many bytes are free for their maps; without it they stay on the
    device if that goes. `release` gives back what can be made again (recordings), when nothing else helps. Latents
    that nothing could decode are written to a file, which the error names.
    """
    stock = type(vae)
    signature = inspect.signature(stock.decode)
    latents = list(signature.parameters)[1]  # most classes call them z, AutoencoderTiny x

    @functools.wraps(stock.decode)
    def decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        return_dict = {**bound.arguments, **bound.kwargs}.get("return_dict", True)
        z = bound.arguments[latents]

        def whole(vae: Any, z: torch.Tensor, **changed: int) -> torch.Tensor:
            bound.arguments |= {latents: z, "return_dict": False, **changed}
            return stock.decode(*bound.args, **bound.kwargs)[0]

        frames = bound.arguments.get("num_frames")
        ways = [*_ways(self, z, whole, in_strips=in_strips, room=room, frames=frames)]
        if release is not None:
            ways.append(_after(release, *ways[-1]))
        sample = _first_that_fits(self, z, ways, frames=frames)
        if not return_dict:
            return (sample,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=sample)

    return give_class(vae, {"decode": decode})


def _first_that_fits(vae: Any, z: torch.Tensor, ways: Iterable[Way], *, frames: int | None) -> torch.Tensor:
    failed = []
    for name, way in ways:
        try:
            return way(vae, z)
        except torch.OutOfMemoryError as error:
            failed.append(name)
            logger.warning("the decode ran out of memory %s; the latents are kept: %s", name, error)
        # Outside of the handler: the error's traceback holds what the failed try had allocated.
        _return_unused(z.device)
    path, beside = _keep(z), "" if frames is None else f", num_frames={frames}"
    raise InputError(
        f"the device has too little memory to decode {[*z.shape]} ({', '.join(failed)}); the latents are in {path}: "
        f"free some memory, then pipe.vae.decode(safetensors.torch.load_file(path)['latents']{beside}); where much is "
        "reserved and not allocated (the log says), PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True from the start on "
        "frees it"
    )


def _ways(
    vae: Any,
    z: torch.Tensor,
    whole: Callable[..., torch.Tensor],
    *,
    in_strips: bool,
    room: Callable[[], int] | None,
    frames: int | None,
) -> Iterator[Way]:
    """The ways to decode, the quickest that should fit first. `frames`: of each video, where these are a batch."""
    if not in_strips:
        yield "whole", whole
    if strips.refuses(vae) is None:
        scale = 2 ** (len(vae.decoder.up_blocks) - 1)
        needed = strips.map_bytes(vae, width=z.shape[-1] * scale, height=z.shape[-2] * scale)
        if room is None or needed < room():
            yield "in strips", _hooked(strips.decode)
        yield "in strips kept on the host", _hooked(functools.partial(strips.decode, store=torch.device("cpu")))
    elif tiles(vae):
        yield "in tiles", functools.partial(_tiled, whole)
    elif frames is not None:
        yield f"{FRAMES} frames at a time", functools.partial(_by_frames, whole, frames)


def tiles(vae: Any) -> bool:
    """Whether a VAE has tiles of its own: diffusers' classes all have the method that asks for them."""
    return hasattr(vae, "use_tiling")


def _after(release: Callable[[], None], name: str, way: Callable[[Any, torch.Tensor], torch.Tensor]) -> Way:
    """A way that is tried once more, after the recordings are gone."""

    def call(vae: Any, z: torch.Tensor) -> torch.Tensor:
        release()
        _return_unused(z.device)
        return way(vae, z)

    return f"{name} without recordings", call


def _return_unused(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _hooked(decode: Callable[..., torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def call(vae: Any, z: torch.Tensor) -> torch.Tensor:
        # An offloaded VAE comes with the hook of its stock decode, which is not called.
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(vae)
        return decode(vae, z)

    return call


def _tiled(whole: Callable[..., torch.Tensor], vae: Any, z: torch.Tensor) -> torch.Tensor:
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        return whole(vae, z)
    finally:
        vae.use_tiling = before


def _by_frames(whole: Callable[..., torch.Tensor], frames: int, vae: Any, z: torch.Tensor) -> torch.Tensor:
    parts = [part for video in z.split(frames) for part in video.split(FRAMES)]
    return torch.cat([whole(vae, part, num_frames=len(part)) for part in parts])


def _keep(z: torch.Tensor) -> Path:
    """Write latents to the working directory, or where that cannot be written to the system's temporary one."""
    name = f"vivace-latents-{time.strftime('%Y%m%d-%H%M%S')}.safetensors"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            save_file({"latents": z.detach().cpu().contiguous()}, folder / name)
            return folder / name
        except OSError:
            continue
    raise InputError("the decode ran out of memory, and the latents could be written nowhere; free some disk space")
