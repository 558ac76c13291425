"""The student: a LoRA beside the teacher's own weights, or a copy of all of them; and its running mean."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vivace.distill.config import Student
from vivace.errors import InputError, first_line

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


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def lora_weights(student: nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA student's weights under the names of the modules they belong to: `...to_q.lora_A.weight`."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(student, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


class Mean:
    """An exponential running mean of a module's trainable weights, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().float().clone() for name, parameter in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, batch: int) -> None:
        """Take in the weights after batch number `batch` (from 0); early on the mean follows faster."""
        decay = min(self.decay, (1 + batch) / (10 + batch))
        for name, parameter in trainable(module).items():
            self.weights[name].lerp_(parameter.detach().float(), 1 - decay)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the mean."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """`module` has the mean as its weights for the length of a `with` block."""
        own = {name: parameter.detach().clone() for name, parameter in trainable(module).items()}
        _copy(self.weights, module)
        try:
            yield
        finally:
            _copy(own, module)


@torch.no_grad()
def _copy(weights: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    for name, parameter in trainable(module).items():
        parameter.copy_(weights[name])
