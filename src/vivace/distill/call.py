"""What a stock pipeline gives its denoiser: recorded once for a batch of prompts, then used at every noise level.

So nothing here knows how a family embeds text, sizes or guidance: its own pipeline says so.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vivace.errors import InputError, first_line
from vivace.family import Family

# Arguments that a pipeline's call gets where it has them: the size is what was asked for, the caption what was written.
QUIET = {"use_resolution_binning": False, "clean_caption": False}
SAMPLES = ("sample", "hidden_states")
CONTROL = ("down_block_additional_residuals", "mid_block_additional_residual")


@dataclass(frozen=True)
class Call:
    """The denoiser's keyword arguments for a batch, without the latents and the time."""

    sample: str  # the argument that takes the latents
    kwargs: Mapping[str, Any]
    halves: bool  # tensors hold the unguided half before the guided one: [2 B, ...]
    time_scale: float = 1.0  # what the denoiser calls time, over the scheduler's
    beside: torch.Tensor | None = None  # [B or 2 B, C', ...] channels that stand beside the latents
    packed: bool = False  # latents go in as 2 x 2 patches: [B, S, 4 C]
    control: Mapping[str, Any] | None = None  # the ControlNet's own arguments

    def guided_half(self) -> Call:
        """The call without its unguided half."""
        return self.half(1) if self.halves else self

    def half(self, index: int) -> Call:
        """The unguided half (0) or the guided one (1)."""
        if not self.halves:
            raise ValueError("this call has no halves")

        def cut(value: torch.Tensor) -> torch.Tensor:
            return value.chunk(2)[index] if value.ndim else value

        return replace(self.map(cut), halves=False)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The call with every tensor changed."""
        return replace(
            self,
            kwargs=_map(self.kwargs, change),
            beside=_map(self.beside, change),
            control=_map(self.control, change),
        )


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(one, change) for one in value)
    return value


class _Seen(Exception):
    """Ends the stock pipeline at its first denoiser call."""


class Recorder:
    """Records the calls that a pipeline's denoiser gets."""

    def __init__(self, pipe: Any, *, family: Family, channels: int) -> None:
        self.pipe = pipe
        self.family = family
        self.channels = channels  # of a latent
        self.denoiser: torch.nn.Module = getattr(pipe, family.denoisers[0])
        self.accepts = set(inspect.signature(type(pipe).__call__).parameters)

    @property
    def batched_guidance(self) -> bool:
        """Whether guidance doubles the batch."""
        return self.family.guidance == "batched"

    @torch.no_grad()
    def record(
        self, prompts: Sequence[str], *, size: tuple[int, int], negative: str | None = None, **inputs: Any
    ) -> Call:
        """The call for these prompts at `size` (width, height) in pixels; `inputs` go to the pipeline's call.

        Raises InputError where the pipeline refuses.
        """
        for name in inputs:
            # Some calls have **kwargs, in which a wrong name would be lost.
            if name not in self.accepts:
                near = ", ".join(difflib.get_close_matches(name, self.accepts, n=3, cutoff=0.0))
                raise InputError(f"a {type(self.pipe).__name__}'s call has no argument {name}; the nearest are {near}")
        wanted = {
            "prompt": list(prompts),
            "width": size[0],
            "height": size[1],
            "guidance_scale": 5.0,  # above 1, so that the unguided half is there
            "num_inference_steps": 2,
            "strength": 1.0,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(0),
            **quiet_of(self.pipe),
        }
        if negative is not None:
            wanted["negative_prompt"] = [negative] * len(prompts)
        known = {name: value for name, value in wanted.items() if name in self.accepts}
        seen: dict[str, Mapping[str, Any]] = {}
        hooks = [_hook(self.denoiser, seen, "denoiser", stop=True)]
        if isinstance(control := getattr(self.pipe, "controlnet", None), torch.nn.Module):
            hooks.append(_hook(control, seen, "control", stop=False))
        try:
            self.pipe(**known | inputs)
        except _Seen:
            pass
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(f"{type(self.pipe).__name__} refused a training batch: {first_line(error)}") from error
        finally:
            for hook in hooks:
                hook.remove()
        return self._call(seen, count=len(prompts))

    def _call(self, seen: Mapping[str, Mapping[str, Any]], *, count: int) -> Call:
        kwargs = dict(seen["denoiser"])
        sample = next((name for name in SAMPLES if name in kwargs), None)
        if sample is None:
            raise InputError(
                f"a {type(self.denoiser).__name__} takes no batch of latents; {self.family.title} cannot be distilled"
            )
        latents, time = kwargs.pop(sample), kwargs.pop("timestep")
        kwargs.pop("return_dict", None)
        packed = latents.ndim == 3
        own = self.channels * (4 if packed else 1)
        axis = 2 if packed else 1
        halves = len(latents) == 2 * count
        if self.batched_guidance and not halves:
            raise InputError(
                f"{type(self.pipe).__name__} made a call of {len(latents)} for {count} prompts with guidance"
            )
        beside = None if latents.shape[axis] == own else latents.narrow(axis, own, latents.shape[axis] - own)
        control = dict(seen["control"]) if "control" in seen else None
        if control is not None:
            missing = [name for name in CONTROL if name not in kwargs]
            if missing:
                raise InputError(
                    f"a {type(self.pipe).__name__}'s ControlNet is not one of a UNet; distil with a UNet's"
                )
            for name in (*CONTROL, "timestep", "return_dict"):
                (kwargs if name in CONTROL else control).pop(name, None)
            control.pop("sample", None)
        first = float(self.pipe.scheduler.timesteps[0])
        scale = float(time.flatten()[0]) / first if isinstance(time, torch.Tensor) else float(time) / first
        if min(abs(scale - known) for known in (1.0, 1e-3)) > 1e-2 * scale:
            raise InputError(
                f"a {type(self.denoiser).__name__} is told {scale:.4g} times the timestep; only 1 and 0.001 fit"
            )
        scale = 1.0 if scale > 0.5 else 1e-3
        return Call(sample, kwargs, halves, scale, beside, packed, control)


def quiet_of(pipe: Any) -> dict[str, bool]:
    """The arguments of QUIET that a pipeline's call has."""
    accepts = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in QUIET.items() if name in accepts}


def _hook(module: torch.nn.Module, seen: dict[str, Mapping[str, Any]], name: str, *, stop: bool) -> Any:
    names = list(inspect.signature(type(module).forward).parameters)[1:]

    def look(_: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen[name] = {**dict(zip(names, args, strict=False)), **kwargs}
        if stop:
            raise _Seen

    return module.register_forward_pre_hook(look, with_kwargs=True)


def pack(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as 2 x 2 patches, [B, H W / 4, 4 C]."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(x: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    x = x.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
