"""Compiling, in parallel and ahead, the kernels that a model's call will launch.

The call is rehearsed on "meta" tensors, which have shapes and types but no values: operations of torch do nothing, and
operations of this package compile instead of running. Nothing is held or started on the device.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vivace.kernels.language import COMPILE_ONLY, triton


def skeleton(module: torch.nn.Module) -> Any:
    """A copy of `module` without values: its parameters and buffers are "meta" tensors, its offload hooks gone."""
    memo: dict[int, Any] = {id(buffer): without_values(buffer) for buffer in module.buffers()}
    memo |= {id(p): torch.nn.Parameter(without_values(p), requires_grad=False) for p in module.parameters()}
    # A hook may hold other models.
    memo |= {id(vars(child)["_hf_hook"]): None for child in module.modules() if "_hf_hook" in vars(child)}
    return copy.deepcopy(module, memo)


def without_values(tensors: Any) -> Any:
    """The tensors in `tensors`, nested as they are, on the "meta" device."""

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return tree_map_only(torch.Tensor, meta, tensors)


def rehearse(
    call: Callable[..., Any],
    arguments: Iterable[Mapping[str, Any]],
    *,
    threads: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Compile what `call(**kwargs)` launches for each of `arguments`, on "meta" tensors, for the current device.

    `threads` of None means as many as there are cores. While they compile this one does what `meanwhile` says.
    """
    with torch.no_grad(), ThreadPoolExecutor(threads or os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        token = COMPILE_ONLY.set(True)
        try:
            for kwargs in arguments:
                call(**kwargs)
        finally:
            COMPILE_ONLY.reset(token)
        if meanwhile is not None:
            meanwhile()
