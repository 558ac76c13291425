"""Few-step sampling: the scheduler a few-step student needs, and the student put into a pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler

from vivace import checkpoint
from vivace.errors import InputError

FOLDER = "few_step"  # in a model's folder: its few-step student
WEIGHTS = "pytorch_lora_weights.safetensors"
FACTS = "vivace.json"
DENOISERS = ("transformer", "unet")


class FewStepFlow(FlowMatchEulerDiscreteScheduler):
    """Stochastic Euler for flow models, on the few-step grid and reproducible.

    Each step goes to the predicted picture and back up: x' = (1 - sigma') x0 + sigma' n. Two things differ from stock
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), whose configuration this one has. The steps are 1, 3/4,
    1/2, 1/4 of the path (shifted as the configuration says) and not 1, 2/3, 1/3, 0.001. And n follows from the noise
    that the sample began with, once for every picture: SD3's and FLUX's pipelines hand their generator to no scheduler,
    so that a seed would not name a picture, nor a picture be the same in another batch.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **kwargs: Any) -> None:
        """As stock; without `sigmas` or `timesteps` the few-step grid."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        if num_inference_steps is not None and not {"sigmas", "timesteps"} & given.keys():
            given["sigmas"] = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        self._generators: list[torch.Generator] | None = None
        super().set_timesteps(num_inference_steps, device=device, **given)

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, generator: Any = None, **kwargs: Any
    ) -> Any:
        """As stock, with the sample's own noise where no generator is given."""
        if generator is None:
            if self._generators is None:
                self._generators = [_generator_of(one) for one in sample]
            generator = self._generators
        return super().step(model_output, timestep, sample, *args, generator=generator, **kwargs)


def _generator_of(noise: torch.Tensor) -> torch.Generator:
    """A generator that the first values of `noise` seed."""
    values = noise.flatten()[:256].to("cpu", torch.float32).numpy()
    seed = int.from_bytes(hashlib.sha256(values.tobytes()).digest()[:7], "little")
    return torch.Generator().manual_seed(seed)


def few_step_scheduler(scheduler: Any) -> Any:
    """The few-step scheduler for the noise schedule of `scheduler`: LCM's, or `FewStepFlow` for a flow model."""
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch") or isinstance(scheduler, FewStepFlow):
        return FewStepFlow.from_config(config, stochastic_sampling=True)
    # With every training step as an original step, N steps begin at the same times that a K-step teacher's modes have.
    own = {"original_inference_steps": config["num_train_timesteps"], "clip_sample": False, "thresholding": False}
    return LCMScheduler.from_config(config, **own)


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Write the few-step scheduler for `scheduler` as a stock class's configuration."""
    made = few_step_scheduler(scheduler)
    if isinstance(made, FewStepFlow):
        made = FlowMatchEulerDiscreteScheduler.from_config(made.config, stochastic_sampling=True)
    made.save_config(folder)


def facts(folder: Path) -> dict[str, Any]:
    """The steps and guidance that the student in `folder` was made for. Raises InputError where there is none."""
    try:
        found = json.loads((folder / FACTS).read_text("utf-8"))
        return {"steps": int(found["steps"]), "guidance": float(found["guidance"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no few-step student; make one with vivace distill") from error


def use_few_step(pipe: DiffusionPipeline, folder: str | Path) -> DiffusionPipeline:
    """Put the student in `folder` (a result of `vivace distill`) into `pipe`: its weights and its scheduler.

    The LoRA is added to the weights, so that it stacks with others. Call the pipeline with the steps and the guidance
    in the folder's vivace.json. Raises InputError where it does not fit.
    """
    folder = Path(folder)
    facts(folder)
    name = next(name for name in DENOISERS if getattr(pipe, name, None) is not None)
    if (folder / WEIGHTS).is_file():
        fold(getattr(pipe, name), folder / WEIGHTS, prefix=f"{name}.")
    else:
        denoiser: Any = type(getattr(pipe, name))
        old = getattr(pipe, name)
        new = denoiser.from_pretrained(folder, subfolder=name, torch_dtype=old.dtype, use_safetensors=True)
        pipe.register_modules(**{name: new.to(old.device)})
    pipe.register_modules(scheduler=few_step_scheduler(pipe.components["scheduler"]))
    return pipe


@torch.no_grad()
def fold(denoiser: torch.nn.Module, path: Path, *, prefix: str) -> None:
    """Add the LoRA in `path` to a denoiser's weights: W + B A. Raises InputError where a layer of it is not there."""
    from safetensors.torch import load_file

    checkpoint.header(path)
    weights: Mapping[str, torch.Tensor] = load_file(path)
    modules = dict(denoiser.named_modules())
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = {name.removesuffix(ends[0]) for name in weights if name.endswith(ends[0])}
    for layer in layers:
        module: Any = modules.get(layer.removeprefix(prefix))
        down, up = (weights[layer + end] for end in ends)
        if module is None or module.weight.shape[:2] != (up.shape[0], down.shape[1]):
            raise InputError(
                f"{path} does not fit this {type(denoiser).__name__}: it has no layer {layer} of that shape"
            )
    for layer in layers:
        module = modules[layer.removeprefix(prefix)]
        down, up = (weights[layer + end].to(module.weight.device, torch.float32) for end in ends)
        added = torch.einsum("or...,ri...->oi...", up.flatten(1), down.flatten(1).unflatten(1, down.shape[1:]))
        module.weight.add_(added.view_as(module.weight).to(module.weight.dtype))
