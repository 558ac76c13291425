"""Sample grids: what the student draws by now, one row a number of steps.

Of text alone the stock pipeline draws it, from the config's prompts. With conditioners it is drawn as in training, from
the data's first batch, whose conditions it has: every way to join one is then served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import nn

from vivace.distill.actors import Actors
from vivace.distill.call import quiet_of
from vivace.distill.config import DistillConfig
from vivace.distill.data import supply_of
from vivace.distill.objective import Item, Start
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
    return _sheet(rows)


def first_item(actors: Actors, *, rank: int = 0, world: int = 1) -> Item:
    """The first batch of the config's data, from a supply of its own: the training's stands where it stood."""
    config, device = actors.config, str(actors.pipe.device)
    supply = supply_of(config, multiple=actors.family.multiple, rank=rank, world=world, device=device)
    found = next(supply)
    return found if isinstance(found, Item) else actors.prepare(found, seed=config.seed)


@torch.no_grad()
def draw_conditioned(actors: Actors, student: Callable[..., Any], item: Item) -> Image.Image:
    """The item's pictures, and below them what the student makes of their captions and conditions."""
    config, objective, view = actors.config, actors.objective, actors.objective.view
    guidance, device = sampled_guidance(actors.pipe, config), item.z.device
    rows = [_pictures(actors, item.z)]
    for steps in config.records.steps:
        levels = view.levels.grid(steps, tokens=objective.tokens(item.z))
        generator = torch.Generator(device).manual_seed(config.seed)
        x = objective.simulated(item, levels, guidance, student, generator)
        rows.append(_pictures(actors, objective.predict(student, Start(x, levels[-2:], guidance), item)))
    return _sheet(rows)


def _pictures(actors: Actors, z: torch.Tensor) -> list[Image.Image]:
    """Latents [B, C, h, w] as pictures, one decoded at a time."""
    pixels = [(actors.decode(one) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0) for one in z.split(1)]
    return [Image.fromarray((one * 255).round().byte().cpu().numpy()) for one in pixels]


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * width, row * height))
    return sheet
