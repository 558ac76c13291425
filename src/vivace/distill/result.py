"""What a distillation leaves: a LoRA that stock diffusers and ComfyUI read, or a denoiser; and its scheduler."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vivace.distill.checkpoint import flush
from vivace.distill.config import DistillConfig
from vivace.few_step import ENDS, FACTS, WEIGHTS, key
from vivace.few_step_flow import save_scheduler


def write_result(
    student: nn.Module,
    weights: Mapping[str, torch.Tensor],
    pipe: Any,
    config: DistillConfig,
    folder: Path,
    *,
    slot: str,
) -> Path:
    """Write a student, the few-step scheduler's configuration and vivace.json into `folder`, replacing it as a whole.

    `weights` are `state_of(student)`.

    A LoRA's keys are those that stock `load_lora_weights` and ComfyUI both read.
    """
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if config.student.kind == "lora":
        save_file(named(weights, slot=slot), temporary / WEIGHTS, metadata={"format": "pt"})
    else:
        denoiser: Any = student
        denoiser.save_config(temporary / slot)
        save_file(dict(weights), temporary / slot / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    save_scheduler(pipe.scheduler, temporary / "scheduler")
    facts = {"steps": config.records.steps[0], "guidance": sampled_guidance(pipe, config)}
    (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    _replace(folder, temporary)
    return folder


def _replace(folder: Path, new: Path) -> None:
    """Put a whole folder in the place of another, which is removed only when the new one stands there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def named(weights: Mapping[str, torch.Tensor], *, slot: str) -> dict[str, torch.Tensor]:
    """A LoRA student's weights in float16 under the names of its file; alpha, where the format has one, is the rank."""
    found = {}
    for name, tensor in weights.items():
        module, _, rest = name.rpartition(".lora_")
        if not module:
            continue
        side = rest[0]  # of lora_A.student.weight
        layer = key(module, slot=slot)
        found[layer + ENDS[slot][side == "B"]] = tensor.to(torch.float16)
        if slot == "unet":
            found[f"{layer}.alpha"] = torch.tensor(float(tensor.shape[side == "B"]))
    return found


def sampled_guidance(pipe: Any, config: DistillConfig) -> float:
    """The guidance to call the pipeline with: 1, or where the model embeds it what the student was told."""
    if not getattr(pipe.components.get("transformer"), "config", {}).get("guidance_embeds"):
        return 1.0
    return config.guidance if config.guidance is not None else sum(config.stages[-1].guidance) / 2
