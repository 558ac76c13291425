"""Tiny teachers of every backbone, and configs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vivace.distill import Conditioner, Data, DistillConfig, Records, Stage, Student
from vivace.distill.actors import Actors, make_actors
from vivace.distill.data.sample import Batch
from vivace.families import FAMILIES

EDGES = Conditioner(join="argument", argument="image", source="edges")
ENLARGED = Conditioner(join="argument", argument="image", source="enlarged")
MASKED = (
    Conditioner(join="argument", argument="image", source="pixels"),
    Conditioner(join="argument", argument="mask_image", source="random_mask"),
)
# name -> family, pipeline class, conditioners: one for each backbone that has a ready config
BACKBONES: dict[str, tuple[str, str | None, tuple[Conditioner, ...]]] = {
    "builtin": ("sd3", None, ()),
    "sd15": ("sd", None, ()),
    "sd15-inpaint": ("sd", "StableDiffusionInpaintPipeline", MASKED),
    "sdxl": ("sdxl", None, ()),
    "pixart": ("pixart", "PixArtAlphaPipeline", ()),
    "sd3": ("sd3", None, ()),
    "flux": ("flux", None, ()),
    "sdxl-adapter": ("sdxl", "StableDiffusionXLAdapterPipeline", (EDGES,)),
    "sdxl-controlnet": ("sdxl", "StableDiffusionXLControlNetPipeline", (EDGES,)),
    "sdxl-upscale": ("sdxl", "StableDiffusionXLControlNetPipeline", (ENLARGED,)),
}


def tiny_teacher(backbone: str) -> Any:
    """A fresh tiny pipeline of a backbone."""
    family, pipeline, _ = BACKBONES[backbone]
    pipe = FAMILIES[family].tiny(pipeline)
    if backbone == "builtin":
        pipe.register_modules(**builtin_parts())
    if backbone == "sd15-inpaint":
        from diffusers import UNet2DConditionModel

        from vivace.families.sd import TINY

        torch.manual_seed(0)
        pipe.register_modules(unet=UNet2DConditionModel(**{**TINY, "in_channels": 9}).eval())
    return pipe


def builtin_parts() -> dict[str, Any]:
    """A transformer and an autoencoder of the built-in model's classes and channels, smaller."""
    from diffusers import AutoencoderTiny, SD3Transformer2DModel

    from vivace.families.sd3 import TINY

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        latent_channels=8,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    plain = {**TINY, "dual_attention_layers": ()}
    transformer = SD3Transformer2DModel(**plain, in_channels=8, out_channels=8)
    return {"vae": vae.eval(), "transformer": transformer.eval()}


@pytest.fixture(scope="session")
def config() -> Callable[..., DistillConfig]:
    """A small config; fields replace its own."""

    def make(output: object = "unused", **fields: Any) -> DistillConfig:
        own: dict[str, Any] = {
            "output": str(output),
            "stages": (
                Stage(batches=2, steps=4, guidance=(2.0, 4.0), modes=(0.0, 0.0, 0.5, 0.5)),
                Stage(batches=8, steps=4, guidance=(2.0, 4.0), matching=0.5, adversarial=0.3),
            ),
            "size": (64, 64),
            "data": Data(kind="builtin"),
            "student": Student(rank=4),
            "records": Records(trackers=(), sample_every=0, save_every=100),
            "batch": 2,
            "accelerate": None,
        }
        return DistillConfig(**own | fields)

    return make


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Two pictures with captions."""
    generator = torch.Generator().manual_seed(3)
    return Batch(torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1, ("a red circle", "a blue square"))


@pytest.fixture(scope="session")
def actors_of(config: Callable[..., DistillConfig]) -> Callable[[str], Actors]:
    """The actors of a backbone, made once; tests leave their weights as they are."""
    made: dict[str, Actors] = {}

    def make(backbone: str) -> Actors:
        if backbone not in made:
            conditioners = BACKBONES[backbone][2]
            made[backbone] = make_actors(config(conditioners=conditioners), tiny_teacher(backbone))
        return made[backbone]

    return make


@pytest.fixture(params=BACKBONES)
def actors(request: pytest.FixtureRequest, actors_of: Callable[[str], Actors]) -> Actors:
    """The actors of every backbone in turn."""
    return actors_of(request.param)


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> tuple[Any, tuple[Conditioner, ...]]:
    """A fresh tiny pipeline of every backbone in turn, and the conditioners it needs."""
    return tiny_teacher(request.param), BACKBONES[request.param][2]
