"""Conditions beside the text: each way to join, through to a gradient, and one of the user's own."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from vivace.distill import Conditioner
from vivace.distill.actors import make_actors
from vivace.distill.conditioners import SOURCES, Setting, edges, enlarged, random_mask
from vivace.distill.data.sample import Batch
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.families import sd as sd_family


def unet_of(channels: int):
    """A tiny Stable Diffusion whose UNet takes so many channels."""
    from diffusers import UNet2DConditionModel

    pipe = FAMILIES["sd"].tiny()
    torch.manual_seed(0)
    pipe.register_modules(unet=UNet2DConditionModel(**{**sd_family.TINY, "in_channels": channels}).eval())
    return pipe


def learn(actors, batch):
    """One student loss, backward; the item."""
    item = actors.prepare(batch)
    generator = torch.Generator().manual_seed(0)
    start = actors.objective.start(item, actors.config.stages[0], actors.student, generator)
    target = actors.objective.target(item, start, actors.student)
    loss = (actors.objective.predict(actors.student, start, item) - target).square().mean()
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in actors.student.parameters())
    return item


@pytest.mark.parametrize(("source", "channels"), [("masked_latents", 9), ("low_resolution", 8)])
def test_concatenated_for_inpainting_and_super_resolution(config, batch, source, channels):
    conditioner = Conditioner(join="concatenated", source=source)
    item = learn(make_actors(config(conditioners=(conditioner,)), unet_of(channels)), batch)
    assert item.call.beside is not None
    assert item.call.beside.shape == (4, channels - 4, 8, 8)
    assert torch.equal(item.call.beside[:2], item.call.beside[2:])


def test_the_inpainting_pipelines_own_channels(config, batch):
    """A nine-channel UNet in its stock pipeline: mask and masked picture come from the pipeline's own call."""
    from diffusers import StableDiffusionInpaintPipeline

    parts = unet_of(9).components
    pipe = StableDiffusionInpaintPipeline(**{**parts, "requires_safety_checker": False})
    conditioners = (
        Conditioner(join="argument", argument="image", source="pixels"),
        Conditioner(join="argument", argument="mask_image", source="random_mask"),
    )
    item = learn(make_actors(config(conditioners=conditioners), pipe), batch)
    assert item.call.beside is not None
    mask = item.call.beside[:, 0]
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 0.02 < float(mask.mean()) < 0.7


def test_channels_that_do_not_fit_are_refused(config):
    conditioner = Conditioner(join="concatenated", source="low_resolution")
    with pytest.raises(InputError, match="the denoiser takes 4 channels and gets 8"):
        make_actors(config(conditioners=(conditioner,)), FAMILIES["sd"].tiny())


@pytest.fixture
def own(monkeypatch):
    """A module of the user's with two sources."""
    module = types.ModuleType("my_conditions")
    width = 32
    module.tokens = lambda batch, setting: batch.pixels.mean((2, 3)).repeat(1, 22)[:, None, :64].expand(-1, 3, -1)  # type: ignore[attr-defined]
    module.face = lambda batch, setting: torch.ones(len(batch.pixels), 2 * width)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_conditions", module)


def test_cross_attended_tokens_of_ones_own(config, batch, own):
    plain = make_actors(config(), FAMILIES["sd3"].tiny()).prepare(batch)
    for guided in (False, True):
        conditioner = Conditioner(join="cross_attended", source="my_conditions:tokens", guided=guided)
        item = learn(make_actors(config(conditioners=(conditioner,)), FAMILIES["sd3"].tiny()), batch)
        text, longer = plain.call.kwargs["encoder_hidden_states"], item.call.kwargs["encoder_hidden_states"]
        assert longer.shape[1] == text.shape[1] + 3
        assert torch.equal(longer[:, :-3], text)
        assert bool((longer[:2, -3:] == 0).all()) == guided
        assert bool(longer[2:, -3:].any())


def test_a_vector_of_ones_own(config, batch, own):
    plain = make_actors(config(), FAMILIES["sd3"].tiny()).prepare(batch)
    conditioner = Conditioner(join="vector", source="my_conditions:face", guided=True)
    item = learn(make_actors(config(conditioners=(conditioner,)), FAMILIES["sd3"].tiny()), batch)
    moved = item.call.kwargs["pooled_projections"] - plain.call.kwargs["pooled_projections"]
    assert torch.allclose(moved[:2], torch.zeros(2, 64))
    assert torch.allclose(moved[2:], torch.ones(2, 64), atol=1e-6)


def test_cross_attended_masks_and_places_grow_too(config, batch, monkeypatch):
    module = types.ModuleType("my_conditions")
    module.tokens = lambda batch, setting: torch.ones(len(batch.pixels), 2, 32)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_conditions", module)
    conditioner = Conditioner(join="cross_attended", source="my_conditions:tokens")
    pixart = learn(make_actors(config(conditioners=(conditioner,)), FAMILIES["pixart"].tiny()), batch).call.kwargs
    assert pixart["encoder_attention_mask"].shape[1] == pixart["encoder_hidden_states"].shape[1]
    flux = learn(make_actors(config(conditioners=(conditioner,)), FAMILIES["flux"].tiny()), batch).call.kwargs
    assert flux["txt_ids"].shape[0] == flux["encoder_hidden_states"].shape[1]


@pytest.mark.parametrize(
    ("conditioner", "said"),
    [
        ({"join": "cross_attended", "source": "nothing"}, "no source 'nothing'; it is one of random_mask"),
        ({"join": "cross_attended", "source": "no_module:x"}, "cannot be imported"),
        ({"join": "cross_attended", "source": "pixels"}, r"of shape \[2, 3, 64, 64\] cannot join text as \[B, T, 64\]"),
        (
            {"join": "concatenated", "source": "low_resolution", "options": {"scale": 2}},
            "the source low_resolution does not take these options: .*'scale'",
        ),
        ({"join": "vector", "source": "pixels"}, "no pooled text of shape"),
        ({"join": "vector", "source": "embedding"}, "has no image encoder"),
        ({"join": "argument", "argument": "imgae", "source": "pixels"}, "call has no argument imgae; the nearest are"),
    ],
)
def test_what_cannot_join_is_said(config, conditioner, said):
    with pytest.raises(InputError, match=said):
        make_actors(config(conditioners=(Conditioner(**conditioner),)), FAMILIES["sd3"].tiny())


def test_masks_are_rectangles_of_the_sizes_asked():
    batch = Batch(torch.zeros(50, 3, 40, 80), ("",) * 50)
    mask = random_mask(batch, _setting(), least=0.25, most=0.5)
    rows, columns = mask.amax(3).sum((1, 2)), mask.amax(2).sum((1, 2))
    assert torch.equal(mask.sum((1, 2, 3)), rows * columns)
    assert 10 <= float(rows.min()) < float(rows.max()) <= 20
    assert 20 <= float(columns.min()) < float(columns.max()) <= 40


def test_edges_are_where_the_picture_changes():
    picture = torch.full((1, 3, 8, 8), -1.0)
    picture[..., 4:] = 1.0
    found = edges(Batch(picture, ("",)), _setting())
    assert found.shape == (1, 3, 8, 8)
    assert bool((found[..., 3:5] == 1).all())
    assert not bool(found[..., :3].any())
    assert not bool(found[..., 5:].any())


def _setting() -> Setting:
    return Setting(None, lambda pixels: pixels, torch.Generator().manual_seed(0))


def test_the_pages_own_conditioner_runs(config, batch, tmp_path, monkeypatch):
    """The example of docs/distill.md, with a tiny face encoder and SDXL's text width made tiny."""
    from vivace.families.tiny import clip_vision

    page = (Path(__file__).parents[2] / "docs" / "distill.md").read_text("utf-8")
    code, yaml_text = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clip_vision().save_pretrained("face-encoder")
    save_file({"weight": torch.randn(4 * 64, 32)}, "face-tokens.safetensors")
    (tmp_path / "faces.py").write_text(code.replace("2048", "64"))
    monkeypatch.syspath_prepend(tmp_path)
    values = yaml.safe_load(yaml_text)["conditioners"]
    chosen = config(conditioners=tuple(Conditioner(**one) for one in values))
    with_faces = Batch(batch.pixels, batch.captions, {"face": batch.pixels.flip(0)})
    item = learn(make_actors(chosen, FAMILIES["sdxl"].tiny()), with_faces)
    text = item.call.kwargs["encoder_hidden_states"]
    assert not text[:2, -4:].any()
    assert not torch.equal(text[2, -4:], text[3, -4:])


def test_every_source_has_a_line_of_its_own():
    assert all((source.__doc__ or "").strip() for source in SOURCES.values())


def test_an_enlarged_picture_has_lost_its_details():
    """Even areas stay as they are; a pattern finer than the factor becomes its mean."""
    pixels = torch.full((1, 3, 32, 32), 0.5)
    pixels[..., ::2] = -0.5
    fine = enlarged(Batch(pixels, ("",)), None, factor=4)
    assert fine.shape == pixels.shape
    torch.testing.assert_close(fine, torch.full_like(fine, 0.5))
    even = enlarged(Batch(torch.full((1, 3, 32, 32), 0.5), ("",)), None, factor=4)
    torch.testing.assert_close(even, torch.full_like(even, 0.75))
