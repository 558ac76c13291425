"""The actors: latents as the pipeline decodes them, and teachers that cannot be distilled."""

import pytest
import torch
from peft import LoraConfig

from vivace import accelerate
from vivace.config import PRESETS, Config
from vivace.distill import Data, Stage
from vivace.distill.actors import make_actors
from vivace.distill.data.sample import Batch
from vivace.distill.student import trainable
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.quant.linear import QuantLinear


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


@pytest.fixture
def eight_bits(monkeypatch):
    """What `balanced` does on a GPU."""
    monkeypatch.setitem(PRESETS, "balanced", Config(quant="int8"))


@pytest.mark.parametrize("distance", ["l2", "features"])
def test_gradients_come_through_the_16_bit_weights_of_a_quantised_teacher(config, batch, eight_bits, distance):
    """Its solver runs in 8 bits; what comes after rounding has no gradient, so losses take the stock blocks."""
    stage = Stage(batches=1, steps=4, guidance=(2.0, 2.0), adversarial=1.0)
    found = []
    for preset in ("exact", "balanced"):
        actors = make_actors(config(accelerate=preset, stages=(stage,), distance=distance), FAMILIES["sd3"].tiny())
        objective, item = actors.objective, actors.prepare(batch)
        quantised = [module for module in actors.teacher.modules() if isinstance(module, QuantLinear)]
        assert bool(quantised) == (preset == "balanced")
        generator = torch.Generator().manual_seed(0)
        start = objective.start(item, stage, actors.student, generator)
        picture = objective.predict(actors.student, start, item)
        loss = objective.distance(picture, item.z, item, start)
        loss = loss + objective.fooling(actors.discriminator, picture, item, start, generator)
        loss.backward()
        found.append({name: one.grad.clone() for name, one in trainable(actors.student).items() if "lora_B" in name})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_teacher_that_was_loaded_in_eight_bits_is_refused(config, eight_bits):
    pipe = FAMILIES["sd3"].tiny()
    accelerate(pipe, "balanced")
    with pytest.raises(InputError, match=r"no gradient comes to a student; give the model in 16 bit"):
        make_actors(config(accelerate=None), pipe)


def test_a_teacher_with_a_lora_beside_its_weights_is_refused(config):
    """Its student would begin without it, and its result mix the two."""
    pipe = FAMILIES["sdxl"].tiny()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(InputError, match=r"has a LoRA beside its weights.*pipe\.fuse_lora\(\), pipe\.unload_lora"):
        make_actors(config(), pipe)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        (
            "flux",
            {"negative": "blurry"},
            "negative is the prompt of the unguided half, and this teacher's call has none",
        ),
        ("sdxl", {"guidance": 3.5}, "guidance is for a student that is told it, and this teacher embeds none"),
    ],
)
def test_what_a_teacher_would_not_hear_is_refused(config, family, fields, said):
    with pytest.raises(InputError, match=said):
        make_actors(config(**fields), FAMILIES[family].tiny())


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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": (2048, 64)}, r"\[2048, 64\] pixels \(Width \(128\) cannot be greater than `pos_embed_max_size`: 64"),
        ({"data": Data(path="x", ratios=(1.0, 1e-3))}, r"\[16, 2016\] pixels \(Height"),
    ],
)
def test_a_size_that_the_denoiser_refuses_is_said_before_training(config, fields, said):
    with pytest.raises(InputError, match=f"the denoiser refuses a picture of {said}.*; check size, data.ratios"):
        make_actors(config(**fields), FAMILIES["sd3"].tiny())


def test_the_discriminator_takes_every_bucket(config):
    """It was as deep as pictures of `size` allow, which is too deep for the short side of another ratio."""
    made = make_actors(config(size=(128, 128), data=Data(path="x", ratios=(1.0, 0.25))), FAMILIES["sd3"].tiny())
    assert made.discriminator is not None
    for width, height in ((128, 128), (64, 256)):
        item = made.prepare(Batch(torch.zeros(2, 3, height, width), ("a", "b")))
        sigma = torch.full((2,), 0.5, dtype=torch.float64)
        with torch.no_grad():
            logits = made.discriminator(made.objective.seen(item.z, sigma, item.call.guided_half()))
        assert logits.shape[0] == 2
