"""Who takes part: the teacher's pipeline, student, discriminator and critic, and what turns a batch into an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vivace.accelerate import accelerate
from vivace.config import resolve
from vivace.distill import conditioners
from vivace.distill.call import Recorder
from vivace.distill.config import DistillConfig
from vivace.distill.data import sizes_of
from vivace.distill.data.sample import Batch
from vivace.distill.discriminator import make_discriminator
from vivace.distill.features import Features
from vivace.distill.levels import levels_of
from vivace.distill.objective import Item, Objective
from vivace.distill.student import beside, compile_blocks, make_student
from vivace.distill.view import View
from vivace.errors import InputError, first_line
from vivace.family import Family, UnknownFamilyError, family_of
from vivace.quant.linear import QuantLinear

SCALES = {"latent_channels", "scaling_factor"}  # what a VAE's configuration says of its latents


@dataclass(frozen=True)
class Actors:
    """Everything that a batch meets."""

    pipe: Any
    family: Family
    recorder: Recorder
    objective: Objective
    student: nn.Module
    discriminator: nn.Module | None
    critic: nn.Module | None
    config: DistillConfig

    @property
    def teacher(self) -> nn.Module:
        """The frozen denoiser."""
        return self.objective.teacher

    @torch.no_grad()
    def prepare(self, batch: Batch, *, seed: int = 0) -> Item:
        """A batch's latents, and what its pipeline tells the denoiser of it."""
        batch = _on(batch, self.pipe.device)
        setting = conditioners.Setting(self.pipe, self.encode, torch.Generator().manual_seed(seed))
        chosen = self.config.conditioners
        inputs = conditioners.inputs_of(chosen, batch, setting)
        call = self.recorder.record(batch.captions, size=batch.size, negative=self.config.negative, **inputs)
        return Item(self.encode(batch.pixels), conditioners.join(call, chosen, batch, setting))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] as the denoiser's latents, float32."""
        vae = self.pipe.vae
        out = vae.encode(pixels.to(vae.device, vae.dtype))
        z = (out.latents if hasattr(out, "latents") else out.latent_dist.mode()).float()
        return (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`: pixels, float32."""
        vae = self.pipe.vae
        z = z / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(z.to(vae.device, vae.dtype)).sample.float()


def make_actors(config: DistillConfig, pipe: Any) -> Actors:
    """The actors around a teacher pipeline on its device. Raises InputError where `config` asks what it cannot do."""
    family = _family_of(config, pipe)
    pipe.set_progress_bar_config(disable=True)
    teacher: Any = getattr(pipe, family.denoisers[0])
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    _check_weights(teacher)
    quantises = config.accelerate is not None and resolve(config.accelerate).quant != "off"
    # Before the teacher is accelerated: the modules that gradients go through stay stock.
    make = partial(make_student, teacher, seed=config.seed, apart=quantises)
    student, critic, judge = make(config.student), None, beside(teacher, apart=quantises)
    if config.critic is not None:
        critic = make(replace(config.student, kind="lora", rank=config.critic.rank))
    if config.student.compile and pipe.device.type == "cuda":
        for module in filter(None, (student, critic, judge)):
            compile_blocks(module, family)
    recompute = config.student.gradient_checkpointing is True
    channels = pipe.vae.config.latent_channels
    prediction, levels = levels_of(pipe.scheduler)
    view = View(prediction, levels, channels, getattr(pipe, "controlnet", None))
    features = Features(family.split(judge), block=config.discriminator.block, recompute=recompute)
    perceptual = None
    if config.lpips_weights is not None:
        from vivace.distill.lpips import decoded_distance

        perceptual = decoded_distance(pipe.vae, Path(config.lpips_weights))
    objective = Objective(config, view, teacher, features, _tokens, perceptual)
    recorder = Recorder(pipe, family=family, channels=channels)
    actors = Actors(pipe, family, recorder, objective, student, None, critic, config)
    probes = [_probe(actors, size) for size in sizes_of(config, multiple=family.multiple)]
    if config.accelerate is not None:
        # The weights in 16 bit are the student's to keep.
        accelerate(pipe, config.accelerate, **({"keep_base": "no"} if quantises else {}))
    if any(stage.adversarial for stage in config.stages):
        return replace(actors, discriminator=_discriminator(objective, probes))
    return actors


def _family_of(config: DistillConfig, pipe: Any) -> Family:
    """The pipeline's family. Raises InputError for one that cannot be distilled, or not at the config's size."""
    try:
        family = family_of(pipe)
    except UnknownFamilyError as error:
        raise InputError(f"distillation needs a family: {error}") from error
    known = getattr(getattr(pipe, "vae", None), "config", {})
    if len(family.denoisers) != 1 or family.media != "image" or not set(known) >= SCALES:
        raise InputError(
            f"{family.title} cannot be distilled: that takes one denoiser that makes pictures, and a VAE whose latents "
            "are scaled by one number"
        )
    if any(side % family.multiple for side in config.size):
        raise InputError(
            f"size {list(config.size)} cannot be made: {family.title} needs multiples of {family.multiple}"
        )
    return family


def _tokens(z: torch.Tensor) -> int:
    """Tokens of a transformer with 2 x 2 patches, which is how flow schedules count a picture's size."""
    return z.shape[2] * z.shape[3] // 4


def blank_item(actors: Actors, size: tuple[int, int]) -> Item:
    """The item of one grey picture of a size in pixels."""
    return actors.prepare(_blank(actors.config, size))


def _blank(config: DistillConfig, size: tuple[int, int]) -> Batch:
    """A batch of one grey picture, with every further picture that a conditioner asks for."""
    width, height = size
    grey = torch.zeros(1, 3, height, width)
    keys = [conditioners.picture_key(one) for one in config.conditioners]
    return Batch(grey, ("",), {key: grey for key in keys if key is not None})


def _on(batch: Batch, device: torch.device) -> Batch:
    extras: Mapping[str, torch.Tensor] = {name: value.to(device) for name, value in batch.extras.items()}
    return Batch(batch.pixels.to(device), batch.captions, extras)


@torch.no_grad()
def _probe(actors: Actors, size: tuple[int, int]) -> Item:
    """A grey picture of a size in pixels, which the teacher was called with. Raises InputError where it refuses."""
    item, view = blank_item(actors, size), actors.objective.view
    _check_item(actors.config, item, actors.teacher)
    sigma = torch.full((1,), view.levels.at(500.0), dtype=torch.float64)
    try:
        view.guided(actors.teacher, item.z, sigma, item.call, guidance=1.0)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"the denoiser refuses a picture of {list(size)} pixels ({first_line(error)}); "
            "check size, data.ratios and conditioners"
        ) from error
    return item


def _check_item(config: DistillConfig, item: Item, teacher: Any) -> None:
    """Raise InputError for guidance that the teacher has not, and for channels that its denoiser does not take."""
    call = item.call
    guided = call.halves or call.kwargs.get("guidance") is not None
    asked = [stage.guidance for stage in config.stages if max(stage.guidance) > 1]
    if asked and not guided:
        raise InputError(f"the teacher has no guidance in its call, and stages ask for {list(asked[0])}; give [1, 1]")
    if config.negative is not None and not call.halves:
        raise InputError("negative is the prompt of the unguided half, and this teacher's call has none; leave it out")
    if config.guidance is not None and call.kwargs.get("guidance") is None:
        raise InputError("guidance is for a student that is told it, and this teacher embeds none; leave it out")
    given = item.z.shape[1] * (4 if call.packed else 1)
    given += 0 if call.beside is None else call.beside.shape[2 if call.packed else 1]
    if given != teacher.config.in_channels:
        raise InputError(
            f"the denoiser takes {teacher.config.in_channels} channels and gets {given}; check conditioners"
        )


def _check_weights(teacher: nn.Module) -> None:
    """Raise InputError for a denoiser in few bits: its student would be too, and rounding has no gradient; and for one
    with LoRA beside its weights: a student's own would take its place.
    """
    if any(isinstance(module, BaseTunerLayer) for module in teacher.modules()):
        raise InputError(
            "the teacher has a LoRA beside its weights, which its student would lose; merge it first: "
            "pipe.fuse_lora(), pipe.unload_lora_weights()"
        )
    if any(isinstance(module, QuantLinear) for module in teacher.modules()):
        raise InputError(
            "the teacher was loaded in few bits, through which no gradient comes to a student; "
            "give the model in 16 bit, and set accelerate: balanced to have its solver run in 8"
        )


@torch.no_grad()
def _discriminator(objective: Objective, probes: Sequence[Item]) -> nn.Module:
    """A discriminator for the teacher's features, as deep as the smallest of the pictures' sizes allows."""
    sigma = torch.full((1,), objective.view.levels.at(500.0), dtype=torch.float64)
    seen = [objective.seen(probe.z, sigma, probe.call.guided_half()) for probe in probes]
    side = min(min(one.shape[2:]) for one in seen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(objective.config.seed)
        made = make_discriminator(seen[0].shape[1], side, width=objective.config.discriminator.width)
    return made.to(seen[0].device)
