"""Trained weights and AdamW's moments as plain tensors by name, whole also where FSDP2 holds shards of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vivace.distill.student import trainable

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights. Every process has to call it."""
    return {name: whole(parameter) for name, parameter in trainable(module).items()}


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All weights and lasting buffers, whole, on the CPU. Every process has to call it."""
    return {name: whole(tensor).cpu().clone() for name, tensor in module.state_dict().items()}


def shard(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Spread a module's weights over the processes (FSDP2), its blocks one by one, so that few are whole at a time."""
    from torch.distributed.fsdp import fully_shard

    for block in (*blocks, module):
        fully_shard(block)


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put `weights_of` back. KeyError where a name is missing."""
    for name, parameter in trainable(module).items():
        parameter.copy_(like(weights[name], parameter))


def moments_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state, as `name/moment`; empty before its first step. Every process has to call it."""
    found = {}
    for name, parameter in trainable(module).items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{moment}"] = whole(value)
    return found


def load_moments(module: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, torch.Tensor]) -> None:
    """Put `moments_of` back."""
    optimizer.state.clear()
    for name, parameter in trainable(module).items():
        if f"{name}/step" not in moments:
            continue
        own = {moment: moments[f"{name}/{moment}"] for moment in MOMENTS}
        # The count stays where AdamW puts it: on the CPU, or with fused=True on the device.
        place = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter] = {
            moment: (value.to(place) if moment == "step" else like(value, parameter)).clone()
            for moment, value in own.items()
        }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of one that is sharded, since no GPU need have room for all of those, on the CPU."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach().cpu()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its shard, or all of it."""
    shard_of: Any = getattr(tensor, "to_local", None)
    return tensor.detach() if shard_of is None else shard_of().detach()


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` on the parameter's device, and sharded as the parameter is."""
    value = value.to(parameter.device)
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    return distribute_tensor(value, mesh, placed.placements)
