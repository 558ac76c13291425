"""A few-step student beside its model: found, and put into a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import checkpoint
from vivace.errors import InputError, first_line
from vivace.load import Source

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

FOLDER = "few_step"  # in a model's folder: its student, a result of `vivace distill`
WEIGHTS = "pytorch_lora_weights.safetensors"
FACTS = "vivace.json"
# Where a denoiser is in a pipeline -> how its LoRA's two matrices are called.
ENDS = {
    "transformer": (".lora_A.weight", ".lora_B.weight"),
    "unet": (".lora_down.weight", ".lora_up.weight"),
}


def facts(folder: Path) -> dict[str, Any]:
    """The steps and guidance that the student in `folder` was made for. Raises InputError where there is none."""
    try:
        found = json.loads((folder / FACTS).read_text("utf-8"))
        steps, guidance = int(found["steps"]), float(found["guidance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no few-step student; make one with vivace distill") from error
    held = any((folder / name).exists() for name in (WEIGHTS, *ENDS))
    if not held or steps < 1 or not guidance >= 0:
        raise InputError(f"{folder} holds no whole few-step student; make one with vivace distill")
    return {"steps": steps, "guidance": guidance}


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
    name = next(name for name in ENDS if getattr(pipe, name, None) is not None)
    if (folder / WEIGHTS).is_file():
        fold(getattr(pipe, name), folder / WEIGHTS, slot=name)
    else:
        old = getattr(pipe, name)
        denoiser: Any = type(old)
        try:
            new = denoiser.from_pretrained(folder, subfolder=name, torch_dtype=old.dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no student of this {denoiser.__name__}: {first_line(error)}") from error
        pipe.register_modules(**{name: new.to(old.device)})
    pipe.register_modules(scheduler=few_step_scheduler(pipe.components["scheduler"]))
    return pipe


def fold(denoiser: torch.nn.Module, path: Path, *, slot: str) -> None:
    """Add the LoRA in `path` to a denoiser's weights: W + B A. Raises InputError where a layer of it is not there."""
    import torch
    from safetensors.torch import load_file

    from vivace.quant.linear import QuantLinear

    checkpoint.header(path)
    weights: Mapping[str, torch.Tensor] = load_file(path)
    modules = {key(name, slot=slot): module for name, module in denoiser.named_modules()}
    down_end, up_end = ENDS[slot]
    layers = [name.removesuffix(down_end) for name in weights if name.endswith(down_end)]
    for layer in layers:
        if layer + up_end not in weights:
            raise InputError(f"{path} is no whole student: it has {layer}{down_end} without its other half")
        module: Any = modules.get(layer)
        if isinstance(module, QuantLinear):
            raise InputError(
                f"{path} cannot be added to quantised weights; take the model as it was, and --set quant=..."
            )
        shape = (weights[layer + up_end].shape[0], weights[layer + down_end].shape[1])
        if module is None or module.weight.shape[:2] != shape:
            raise InputError(f"{path} does not fit this {type(denoiser).__name__}: it has no {layer} of shape {shape}")
    for layer in layers:
        weight: Any = modules[layer].weight
        down, up = (weights[layer + end].to(weight.device, torch.float32) for end in (down_end, up_end))
        added = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight.data.add_(added.to(weight.dtype))


def key(module: str, *, slot: str) -> str:
    """How a LoRA file calls a module of the denoiser in `slot`.

    For UNets these are the names that kohya's trainer began with and ComfyUI, like stock diffusers, reads; for
    transformers both read diffusers' own.
    """
    return "lora_unet_" + module.replace(".", "_") if slot == "unet" else f"{slot}.{module}"
