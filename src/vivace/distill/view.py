"""A denoiser seen through one question: which picture does it believe in, given a noisy one?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vivace.distill.call import CONTROL, Call, pack, unpack
from vivace.distill.levels import Levels, VariancePreserving

# (the denoiser's output, x, alpha, sigma) -> the picture it stands for
DENOISED: dict[str, Callable[..., torch.Tensor]] = {
    "epsilon": lambda out, x, alpha, sigma: (x - sigma * out) / alpha,
    "v": lambda out, x, alpha, sigma: alpha * x - sigma * out,
    # A copy: a recorded graph gives its output in the same place every time.
    "sample": lambda out, x, alpha, sigma: out.clone(),
    "flow": lambda out, x, alpha, sigma: x - sigma * out,
}


@dataclass(frozen=True)
class View:
    """Hides what a model predicts, how it counts time and how it takes its inputs."""

    prediction: str
    levels: Levels
    channels: int  # of a latent
    control: torch.nn.Module | None = None  # a ControlNet, whose residuals change with x and the level

    def noisy(self, z: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The latent z [B, C, H, W] under noise at `sigma` [B]."""
        return _wide(self.levels.alpha(sigma), z) * z + _wide(sigma, z) * noise

    def denoised(self, denoiser: Callable[..., Any], x: torch.Tensor, sigma: torch.Tensor, call: Call) -> torch.Tensor:
        """The picture [B, C, H, W], float32, that `denoiser` sees in x [B, C, H, W] at `sigma` [B]."""
        kwargs = self.arguments(x, sigma, call)
        out = denoiser(**kwargs, return_dict=False)[0]
        if call.packed:
            out = unpack(out, height=x.shape[2], width=x.shape[3])
        # PixArt's output also holds a variance, which no sampler uses.
        out = out[:, : self.channels].float()
        alpha, level = _wide(self.levels.alpha(sigma), x), _wide(sigma, x)
        return DENOISED[self.prediction](out, x.float(), alpha, level)

    def guided(
        self, denoiser: Callable[..., Any], x: torch.Tensor, sigma: torch.Tensor, call: Call, *, guidance: float
    ) -> torch.Tensor:
        """As `denoised`, with guidance: both halves in one call, or embedded where the model embeds it."""
        if not call.halves:
            return self.denoised(denoiser, x, sigma, with_guidance(call, guidance))
        twice = self.denoised(denoiser, torch.cat((x, x)), torch.cat((sigma, sigma)), call)
        without, having = twice.chunk(2)
        return without + guidance * (having - without)

    def arguments(self, x: torch.Tensor, sigma: torch.Tensor, call: Call) -> dict[str, Any]:
        """The denoiser's keyword arguments for x at `sigma`."""
        dtype = _dtype(call, x)
        sample = x.to(dtype)
        if call.packed:
            sample = pack(sample)
        if call.beside is not None:
            sample = torch.cat((sample, call.beside.to(dtype)), dim=2 if call.packed else 1)
        time = self.levels.time(sigma) * call.time_scale
        # Fresh lists and dicts: some denoisers take things out of them.
        kwargs = {
            **call.map(lambda tensor: tensor).kwargs,
            call.sample: sample,
            "timestep": time.to(x.device, non_blocking=True),
        }
        if call.control is not None and self.control is not None:
            residuals = self.control(
                sample=sample[:, : self.channels], timestep=kwargs["timestep"], **call.control, return_dict=False
            )
            kwargs |= dict(zip(CONTROL, residuals, strict=True))
        return kwargs

    def boundary(self, x: torch.Tensor, picture: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the few-step sampler takes as the student's prediction.

        For variance preserving models stock's LCM sampler adds the consistency boundary: c_skip x + c_out picture with
        c_skip = d^2 / ((10 t)^2 + d^2), c_out = 10 t / sqrt((10 t)^2 + d^2), d = 0.5 (arXiv 2303.01469).
        """
        if not isinstance(self.levels, VariancePreserving):
            return picture
        t = _wide(10 * self.levels.time(sigma), x)
        return 0.25 / (t**2 + 0.25) * x + t / (t**2 + 0.25).sqrt() * picture


def with_guidance(call: Call, guidance: float) -> Call:
    """The call with an embedded guidance of `guidance`, where the model embeds one."""
    embedded = call.kwargs.get("guidance")
    if embedded is None:
        return call
    return replace(call, kwargs={**call.kwargs, "guidance": torch.full_like(embedded, guidance)})


def _wide(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, 1, 1] in float32 on the device of x, for which the host, where levels live, does not wait."""
    return value.to(x.device, torch.float32, non_blocking=True).view(-1, *[1] * (x.ndim - 1))


def _dtype(call: Call, x: torch.Tensor) -> torch.dtype:
    """What the model computes in: the dtype of its text."""
    text = call.kwargs.get("encoder_hidden_states")
    return x.dtype if text is None else text.dtype
