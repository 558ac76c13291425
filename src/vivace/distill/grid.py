"""Sample grids: what the student draws by now, one row a number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import nn

from vivace.distill.call import quiet_of
from vivace.distill.config import DistillConfig
from vivace.distill.result import sampled_guidance
from vivace.few_step_flow import few_step_scheduler


@contextmanager
def sampling(pipe: Any, student: nn.Module, *, slot: str) -> Iterator[Any]:
    """`pipe` with the student as its denoiser and the few-step scheduler, for the length of a `with` block."""
    before = {slot: getattr(pipe, slot), "scheduler": pipe.scheduler}
    pipe.register_modules(**{slot: student, "scheduler": few_step_scheduler(pipe.scheduler)})
    try:
        yield pipe
    finally:
        pipe.register_modules(**before)


def draw_grid(pipe: Any, student: nn.Module, config: DistillConfig, *, slot: str) -> Image.Image:
    """Every prompt of the config (columns) with every number of steps (rows), as one picture."""
    rows = []
    quiet = quiet_of(pipe)
    kind = pipe.device.type
    bfloat16 = config.computes_in(kind) == "bfloat16"
    # The student's weights are float32 where it is a whole denoiser, the pipeline's are not.
    cast = torch.autocast(kind, torch.bfloat16, enabled=bfloat16)
    with sampling(pipe, student, slot=slot) as sampler, torch.no_grad(), cast:
        for steps in config.records.steps:
            made = sampler(
                prompt=list(config.records.prompts),
                num_inference_steps=steps,
                guidance_scale=sampled_guidance(pipe, config),
                width=config.size[0],
                height=config.size[1],
                **quiet,
                generator=[torch.Generator().manual_seed(config.seed + i) for i in range(len(config.records.prompts))],
            )
            rows.append(made.images)
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * width, row * height))
    return sheet
