"""The student: a LoRA beside the teacher's own weights, or a copy of all of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from vivace.distill.config import Student
from vivace.distill.low_rank import LowRank
from vivace.errors import InputError, first_line
from vivace.family import Family

ADAPTER = "student"

# Compilations that blocks of one kind share: of each width, with and without a gradient, of the student, the critic and
# the features' denoiser. Past torch's own limit, 8, the rest would run as if not compiled.
VARIANTS = 64


def beside(teacher: nn.Module, *, apart: bool = False) -> nn.Module:
    """The frozen denoiser with modules of its own around the teacher's very tensors.

    The weights are held once, and what is done to the teacher's modules (fused blocks, say) does not reach it. With
    `apart` its tensors are its own, over the same memory: then the teacher can let go of its weights, as one does that
    is quantised.
    """
    held = [*teacher.parameters(), *teacher.buffers()]
    found = copy.deepcopy(teacher, {id(tensor): _twin(tensor) if apart else tensor for tensor in held})
    return found.requires_grad_(False).eval()


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(tensor.data, requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor.detach()


def make_student(teacher: nn.Module, config: Student, *, seed: int = 0, apart: bool = False) -> nn.Module:
    """A trainable denoiser that computes what `teacher` does; its trainable weights are float32.

    A LoRA student shares the teacher's weights, as `beside` does. Raises InputError where no module has a name that
    ends as `config.targets` say.
    """
    if config.kind == "full":
        student = copy.deepcopy(teacher).float().requires_grad_(True)
    else:
        student = beside(teacher, apart=apart)
        _inject(student, config, seed=seed)
    if config.gradient_checkpointing is True:
        recompute(student)
    return student.eval()


def recompute(student: nn.Module) -> None:
    """Have a denoiser compute activations again in the backward pass."""
    enable: Any = student
    enable.enable_gradient_checkpointing(again)


def again(function: Any, *args: Any) -> Any:
    """What `function` makes of `args`; its activations are computed again when the gradient comes back.

    Nothing in a denoiser that is not in training mode draws anything, so no generator's state is kept for that.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


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
    for module in student.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LowRank


def casts_itself(student: nn.Module, kind: torch.dtype) -> bool:
    """Whether a student computes in `kind` without autocast, as its teacher does: all it trains is of `LowRank` layers
    over weights in `kind`.
    """
    layers = [module for module in student.modules() if isinstance(module, LowRank)]
    own = sum(len(list(layer.lora_A.parameters())) + len(list(layer.lora_B.parameters())) for layer in layers)
    return own == len(trainable(student)) and all(layer.base_layer.weight.dtype == kind for layer in layers)


def compile_blocks(denoiser: nn.Module, family: Family) -> None:
    """Compile a denoiser's repeated blocks in place, forward and backward (torch.compile).

    In a UNet those are the transformers' blocks, dozens of two kinds, not its levels, of which each is another.
    """
    kinds = getattr(denoiser, "_repeated_blocks", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    for block in blocks or [block.module for block in family.split(denoiser).blocks]:
        block.compile()
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
