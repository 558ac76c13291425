"""A few-step student beside its model: found, and put into a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import checkpoint
from vivace.errors import InputError
from vivace.load import Source

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

FOLDER = "few_step"  # in a model's folder: its student, a result of `vivace distill`
WEIGHTS = "pytorch_lora_weights.safetensors"
FACTS = "vivace.json"
DENOISERS = ("transformer", "unet")


def facts(folder: Path) -> dict[str, Any]:
    """The steps and guidance that the student in `folder` was made for. Raises InputError where there is none."""
    try:
        found = json.loads((folder / FACTS).read_text("utf-8"))
        return {"steps": int(found["steps"]), "guidance": float(found["guidance"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no few-step student; make one with vivace distill") from error


def source_of(source: Source) -> Source:
    """A model's source with its few-step student's steps and guidance. Raises InputError where it has no student."""
    folder = None if source.path is None else source.path / FOLDER
    if folder is None or not folder.is_dir():
        raise InputError(
            f"{source.name} has no few-step student (a folder {FOLDER} in the model's); "
            "make one with vivace distill and put its result there"
        )
    return replace(source, own={**source.own, **facts(folder)})


def use_few_step(pipe: DiffusionPipeline, folder: str | Path) -> DiffusionPipeline:
    """Put the student in `folder` (a result of `vivace distill`) into `pipe`: its weights and its scheduler.

    The LoRA is added to the weights, so that it stacks with others. Call the pipeline with the steps and the guidance
    in the folder's vivace.json. Raises InputError where it does not fit.
    """
    from vivace.few_step_flow import few_step_scheduler

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


def fold(denoiser: torch.nn.Module, path: Path, *, prefix: str) -> None:
    """Add the LoRA in `path` to a denoiser's weights: W + B A. Raises InputError where a layer of it is not there."""
    import torch
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
        module.weight.data.add_(added.view_as(module.weight).to(module.weight.dtype))
