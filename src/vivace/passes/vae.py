"""Pass: the autoencoder's blocks fused, its range kept in float16, its pictures turned into bytes on the device."""

from __future__ import annotations

import inspect
import logging
import time
from contextlib import ExitStack
from typing import Any

import torch

from vivace.fused import vae as blocks
from vivace.fused import vae_range
from vivace.fused.elementwise import TORCH, elementwise_for
from vivace.fused.postprocess import on_device
from vivace.kernels.language import triton
from vivace.kernels.rehearsal import rehearse, skeleton
from vivace.passes.target import Pass, Target, hooks_of, uncompiled
from vivace.watch import hooked

logger = logging.getLogger(__name__)

PROCESSORS = ("image_processor", "video_processor")
SIDES = (32, 160)
"""Latent rows and columns at which an autoencoder is rehearsed: small groups and large ones."""


def vae_of(target: Target) -> Any:
    """The pipeline's autoencoder, or None."""
    vae = uncompiled(getattr(target.subject, "vae", None)) if target.subject not in target.denoisers.values() else None
    return vae if isinstance(vae, torch.nn.Module) and hasattr(vae, "decode") else None


def _parts(vae: Any) -> list[torch.nn.Module]:
    """What holds the blocks."""
    return [part for name in ("encoder", "decoder") if (part := getattr(vae, name, None)) is not None]


def _check(target: Target) -> str | None:
    vae = vae_of(target)
    if vae is None:
        return "there is no autoencoder"
    if hooks_of(vae) or any(map(hooked, (m for part in _parts(vae) for m in part.modules()))):
        return "its blocks carry hooks"
    if target.device.type == "cuda" and triton is None:
        return "its kernels need Triton, which is not installed; pip install triton"
    if vae_range.overflows(vae) and vae_range.refuses(vae) is None:
        return None
    return blocks.check(vae)


def _apply(target: Target) -> None:
    vae = vae_of(target)
    said = []
    if vae_range.overflows(vae):
        said.append(_scale(target, vae))
    counts = blocks.fuse(vae, elementwise=elementwise_for(target.device), undo=target.undo)
    said.append(_counted(counts))
    if target.device.type == "cuda":
        said.append(_compile_ahead(target, vae))
    undos = [on_device(getattr(target.subject, name, None)) for name in PROCESSORS]
    for undo in filter(None, undos):
        target.undo.callback(undo)
    if any(undos):
        said.append("pictures become bytes on the device")
    target.done("vae", "; ".join(filter(None, said)))


def _scale(target: Target, vae: Any) -> str:
    reason = vae_range.refuses(vae)
    exponent = None if reason else vae_range.exponent(vae)
    if exponent is None:
        return f"its pipeline widens it to float32 for every picture: {reason or 'float32 itself does not hold it'}"
    vae_range.Scaled(vae, exponent).install(undo=target.undo)
    how = f"its streams times 2^-{exponent}" if exponent else "what it computes fits"
    return f"stays in float16 where its pipeline would widen it to float32: {how}"


def _counted(counts: dict[str, int]) -> str:
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind != "activations")
    return f"fused: {listed}" if listed else ""


def _compile_ahead(target: Target, vae: Any) -> str:
    """Compile the decoder's kernels now rather than with the first picture; says how that went."""
    started = time.perf_counter()
    try:
        with torch.cuda.device(target.device), ExitStack() as undo:
            copy = skeleton(vae)
            blocks.fuse(copy, elementwise=elementwise_for(copy.device), undo=undo)
            rehearse(copy.decode, rehearsed_calls(vae))
    except Exception as error:
        # What an autoencoder's own code does without values cannot be foreseen, and the first picture compiles as well.
        logger.warning("kernels of the autoencoder will be compiled with the first picture: %s", error)
        return f"kernels compile with the first picture ({type(error).__name__}: {error})"
    return f"kernels compiled in {time.perf_counter() - started:.1f} s"


def rehearsed_calls(vae: Any) -> list[dict[str, Any]]:
    """The arguments of the decodes that an autoencoder is rehearsed with, without values."""
    channels = vae.config.get("z_dim") or vae.config["latent_channels"]
    frames = (2,) if "z_dim" in vae.config else ()
    # Stable Video Diffusion's takes the frames of a video as a batch.
    count = {"num_frames": 1} if "num_frames" in inspect.signature(vae.decode).parameters else {}
    shapes = [(1, channels, *frames, side, side) for side in SIDES]
    return [{"z": torch.empty(shape, device="meta", dtype=vae.dtype), **count} for shape in shapes]


def _forecast(target: Target) -> str:
    vae, said = vae_of(target), []
    if vae_range.overflows(vae):
        widened = f"its pipeline widens it to float32: {vae_range.refuses(vae)}"
        said.append(widened if vae_range.refuses(vae) else "stays in float16 where its pipeline would widen it")
    with ExitStack() as undo:
        said.append(_counted(blocks.fuse(vae, elementwise=TORCH, undo=undo)))
    return "; ".join(filter(None, said))


VAE = Pass(
    name="vae",
    why_here="after channels_last: it keeps the order it finds; before vram: weights that move are final",
    wants=lambda config: config.vae,
    check=_check,
    apply=_apply,
    forecast=_forecast,
)
