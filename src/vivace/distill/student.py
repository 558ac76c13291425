"""The student: a LoRA beside the teacher's own weights, or a copy of all of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from vivace.distill.config import Student
from vivace.errors import InputError, first_line
from vivace.family import Family

ADAPTER = "student"


def make_student(teacher: nn.Module, config: Student, *, seed: int = 0) -> nn.Module:
    """A trainable denoiser that computes what `teacher` does; its trainable weights are float32.

    A LoRA student has modules of its own around the teacher's very tensors, so the weights are held once, and what is
    done to the teacher's modules (fused blocks, say) does not reach it. Raises InputError where no module has a name
    that ends as `config.targets` say.
    """
    if config.kind == "full":
        student = copy.deepcopy(teacher).float().requires_grad_(True)
    else:
        shared = [*teacher.parameters(), *teacher.buffers()]
        student = copy.deepcopy(teacher, {id(tensor): tensor for tensor in shared})
        student.requires_grad_(False)
        _inject(student, config, seed=seed)
    if config.gradient_checkpointing:
        enable: Any = student
        enable.enable_gradient_checkpointing()
    return student.eval()


def _inject(student: nn.Module, config: Student, *, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(config.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(lora, student, adapter_name=ADAPTER)
        except ValueError as error:
            raise InputError(f"student.targets {list(config.targets)} fit nothing: {first_line(error)}") from error
    for parameter in trainable(student).values():
        parameter.data = parameter.data.float()


def compile_blocks(student: nn.Module, family: Family) -> None:
    """Compile a denoiser's repeated blocks in place, forward and backward (torch.compile)."""
    for block in family.split(student).blocks:
        block.module.compile()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
