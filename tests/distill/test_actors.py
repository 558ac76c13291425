"""The actors: latents as the pipeline decodes them, and teachers that cannot be distilled."""

import pytest
import torch

from vivace.config import PRESETS, Config
from vivace.distill import Stage
from vivace.distill.actors import make_actors
from vivace.errors import InputError
from vivace.families import FAMILIES


def test_latents_are_what_the_pipeline_decodes(actors, batch):
    """Encoded here and decoded as stock pipelines do it: what the VAE alone makes of the pictures."""
    vae = actors.pipe.vae
    with torch.no_grad():
        z = actors.encode(batch.pixels)
        stock = z / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        encoded = vae.encode(batch.pixels)
        alone = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    assert torch.allclose(stock, alone, atol=1e-5)
    assert z.shape == (2, vae.config.latent_channels, 8, 8)


def test_the_shipped_autoencoder_encodes_for_its_pipeline():
    """A render through the built-in autoencoder and back is that render."""
    from diffusers import AutoencoderTiny

    from vivace import builtin
    from vivace.distill.data.world import World

    vae = AutoencoderTiny.from_pretrained(f"{builtin.__path__[0]}/model/vae")
    pixels = next(World(batch=1, seed=0)).pixels
    with torch.no_grad():
        back = vae.decode(vae.encode(pixels).latents).sample
    assert float((back - pixels).abs().mean()) < 0.05


@pytest.mark.parametrize("name", ["wan", "svd", "qwen_image", "flux2", "z_image"])
def test_what_makes_no_pictures_or_takes_other_latents_is_refused(config, name):
    with pytest.raises(InputError, match="cannot be distilled"):
        make_actors(config(), FAMILIES[name].tiny())


def test_a_transformers_controlnet_is_refused(config):
    from vivace.distill import Conditioner

    conditioner = Conditioner(join="argument", argument="control_image", source="edges")
    with pytest.raises(InputError, match="ControlNet is not one of a UNet"):
        make_actors(config(conditioners=(conditioner,)), FAMILIES["sd3"].tiny("StableDiffusion3ControlNetPipeline"))


@pytest.mark.parametrize(
    ("fields", "asks"), [({}, "the adversarial loss"), ({"distance": "features"}, "distance: features")]
)
def test_no_gradient_is_asked_of_a_quantised_teacher(config, monkeypatch, fields, asks):
    """What `balanced` does on a GPU: a gradient through rounded activations is wrong, and nothing would say so."""
    monkeypatch.setitem(PRESETS, "balanced", Config(quant="int8"))
    plain = (Stage(batches=1, steps=4, guidance=(2.0, 3.0), matching=0.5),)
    own = {"accelerate": "balanced"} | ({"stages": plain} | fields if fields else {})
    with pytest.raises(InputError, match=f"the teacher is quantised, and {asks} needs its gradient"):
        make_actors(config(**own), FAMILIES["sd3"].tiny())
    make_actors(config(accelerate="balanced", stages=plain), FAMILIES["sd3"].tiny())


def test_sizes_are_the_familys(config):
    with pytest.raises(InputError, match="needs multiples of 16"):
        make_actors(config(size=(72, 64)), FAMILIES["sd3"].tiny())


def test_buckets_of_other_sizes_pass(actors_of, batch):
    """A batch of another aspect ratio than the config's, through rollout, features and discriminator."""
    from vivace.distill.data.sample import Batch

    for backbone in ("sd3", "flux", "sdxl"):
        actors = actors_of(backbone)
        wide = Batch(torch.zeros(2, 3, 64, 128), batch.captions)
        item = actors.prepare(wide)
        generator = torch.Generator().manual_seed(0)
        start = actors.objective.start(item, actors.config.stages[1], actors.student, generator)
        target = actors.objective.target(item, start, actors.student)
        assert target.shape == item.z.shape == (2, item.z.shape[1], 8, 16)
        assert actors.objective.fooling(actors.discriminator, target, item, start, generator).isfinite()
