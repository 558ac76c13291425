"""What a pipeline makes of some prompts, latents and pictures both, so that it can be compared number by number."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vivace.errors import InputError, first_line


@dataclass(frozen=True, kw_only=True)
class Output:
    """The final latents and the pictures of a run, one of each a prompt (a video has a picture a frame)."""

    latents: torch.Tensor  # [B, ...] as the scheduler left them
    pictures: torch.Tensor  # [B, 3, H, W] float in [0, 1]


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int = 0,
    batch: int = 0,
    reverse: bool = False,
    **call: Any,
) -> Output:
    """Runs a stock text-to-image (or -video) pipeline on `prompts`; the results are on the CPU, in the prompts' order.

    They run `batch` at a time (0: all at once), the last one first with `reverse`. Prompt i starts from the noise of
    seed + i, so another batch or order is the same maths run another way. `call` goes to the pipeline
    (guidance_scale, height, ...). Raises InputError without prompts.
    """
    if not prompts:
        raise InputError("there is nothing to sample, got no prompts; give at least one")
    order = list(range(len(prompts)))[:: -1 if reverse else 1]
    parts = []
    for start in range(0, len(order), batch or len(order)):
        chosen = order[start : start + (batch or len(order))]
        with final_latents(pipe.scheduler) as latents:
            texts, seeds = [prompts[i] for i in chosen], [seed + i for i in chosen]
            pictures = draw(pipe, texts, steps=steps, seeds=seeds, output_type="pt", **call)
        parts.append((latents[0].cpu(), pictures.cpu()))
    latents, pictures = (torch.cat(tensors)[torch.tensor(order).argsort()] for tensors in zip(*parts, strict=True))
    return Output(latents=latents, pictures=pictures.flatten(0, -4).float())


def draw(pipe: Any, prompts: Sequence[str], *, steps: int, seeds: Sequence[int], **call: Any) -> Any:
    """What one call of `pipe` gives for `prompts`, prompt i from the noise of seeds[i], which is drawn on the CPU.

    Raises InputError for a pipeline that takes no prompt, and for what it refuses.
    """
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise InputError(f"a {type(pipe).__name__} takes no prompt, by which its runs are compared; take another model")
    texts, generators = list(prompts), [torch.Generator().manual_seed(seed) for seed in seeds]
    # Some pipelines take no lists, not even of one.
    one = {"prompt": texts[0], "generator": generators[0]} if len(texts) == 1 else None
    chosen = one or {"prompt": texts, "generator": generators}
    try:
        return pipe(**chosen, num_inference_steps=steps, return_dict=False, **call)[0]
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{type(pipe).__name__} refused: {first_line(error)}") from error


@contextmanager
def in_dtype(pipe: Any, dtype: torch.dtype) -> Iterator[Any]:
    """`pipe` computing in `dtype`; afterwards every weight is the very tensor it was.

    Both sets of weights are in memory meanwhile. It is meant for stock pipelines: a pass that shares or quantises
    weights decides their dtype itself.
    """
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    data = [(weight, weight.data) for module in modules for weight in module.parameters(recurse=False)]
    tensors = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    try:
        yield pipe.to(dtype)
    finally:
        for weight, values in data:
            weight.data = values
        for module, parameters, buffers in tensors:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


@contextmanager
def final_latents(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """A list that holds, after a call of the pipeline, the latents its scheduler's last step returned.

    The scheduler's step is the one place every pipeline passes; step callbacks are missing from some.
    """
    kept: list[torch.Tensor] = []
    patched = vars(scheduler).get("step")
    step = scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        kept[:] = [result[0]]
        return result

    scheduler.step = recorded
    try:
        yield kept
    finally:
        if patched is None:
            del scheduler.step
        else:
            scheduler.step = patched
