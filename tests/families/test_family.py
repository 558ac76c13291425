"""Every family and pipeline class: the tiny pipeline runs, and the Split computes what the denoiser does."""

import subprocess
import sys

import diffusers
import pytest
import torch

from vivace import InputError
from vivace.families import FAMILIES
from vivace.family import UnknownFamilyError, family_of

TAKES = {"prompt", "negative", "guidance", "true_cfg", "image", "mask", "strength", "control"}
EVERY_FAMILY = [pytest.param(family, id=family.name) for family in FAMILIES.values()]
EVERY_PIPELINE = [pytest.param(family, name, id=name) for family in FAMILIES.values() for name in family.pipelines]
EVERY_VARIANT = [
    pytest.param(family, name, id=f"{family.name}-{name}") for family in FAMILIES.values() for name in family.variants
]


@pytest.mark.parametrize(("family", "pipeline_class"), EVERY_PIPELINE)
def test_tiny_pipeline_runs_and_its_split_is_exact(family, pipeline_class, seen, assert_split_is_forward):
    pipe = family.tiny(pipeline_class)
    assert type(pipe).__name__ == pipeline_class
    output, calls = seen(pipe)
    pictures = output.frames if hasattr(output, "frames") else output.images
    assert torch.isfinite(torch.as_tensor(pictures[0])).all()
    # the first call: what a pipeline keeps from step to step may be gone by now
    denoiser, kwargs = calls[0]
    assert_split_is_forward(denoiser, kwargs, family=family)


@pytest.mark.parametrize(("family", "pipeline_class"), EVERY_PIPELINE)
def test_family_of_a_class_a_name_and_a_subclass(family, pipeline_class):
    cls = getattr(diffusers, pipeline_class)
    assert family_of(cls) is family_of(pipeline_class) is family_of(type("Mine", (cls,), {})) is family


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_tiny_is_the_same_every_time_and_its_denoiser_is_recognised(family):
    first, second = family.tiny(), family.tiny()
    assert family_of(first) is family
    for name in family.denoisers:
        denoiser = getattr(first, name)
        if denoiser is not None:
            assert family_of(denoiser) is family
            assert not denoiser.training
            same = zip(denoiser.parameters(), getattr(second, name).parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_inputs_drive_the_denoiser(family, assert_split_is_forward):
    denoiser = getattr(family.tiny(), family.denoisers[0])
    frames = 5 if family.media == "video" else 1
    kwargs = family.inputs(denoiser, size=(96, 64), batch=2, frames=frames, text_tokens=7, seed=1)
    assert_split_is_forward(denoiser, kwargs, family=family)
    again = family.inputs(denoiser, size=(96, 64), batch=2, frames=frames, text_tokens=7, seed=1)
    torch.testing.assert_close(denoiser(**kwargs)[0], denoiser(**again)[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_blocks_of_the_split_are_the_named_modules_in_order(family):
    denoiser = getattr(family.tiny(), family.denoisers[0])
    blocks = family.split(denoiser).blocks
    assert all(denoiser.get_submodule(block.name) is block.module for block in blocks)
    lists = [name for name, _ in denoiser.named_modules() if name.split(".")[0] in family.blocks]
    tops = [name for name in lists if name in {block.name for block in blocks}]
    assert sorted(tops) == sorted(block.name for block in blocks)
    order = [family.blocks.index(block.name.split(".")[0]) for block in blocks]
    assert order == sorted(order)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_facts_are_coherent(family):
    assert family.name in FAMILIES
    assert FAMILIES[family.name] is family
    assert family.takes <= TAKES
    assert family.several <= set(family.pipelines)
    assert family.variants
    for name in family.pipelines:
        assert hasattr(diffusers, name)
    for variant in family.variants.values():
        assert all(side % (variant.multiple or family.multiple) == 0 for side in variant.size)
        assert (variant.frames - 1) % family.packed == 0
        batched = (variant.guidance_kind or family.guidance) == "batched"
        assert variant.batch == (2 if batched else 1)


@pytest.mark.parametrize(("family", "variant"), EVERY_VARIANT)
def test_counts_of_the_published_denoisers(family, variant):
    denoiser = family.full(variant, device="meta")
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == family.variants[variant].parameters


def test_an_unknown_class_names_the_nearest_and_says_how_to_add_one():
    with pytest.raises(UnknownFamilyError, match=r"StableDiffusionXLPipelin.*StableDiffusionXLPipeline \(sdxl\)") as e:
        family_of("StableDiffusionXLPipelin")
    assert "families/<name>.py" in str(e.value)
    assert "families/__init__.py" in str(e.value)
    with pytest.raises(UnknownFamilyError, match="Linear"):
        family_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("AnimateDiffPipeline", "a UNet2DConditionModel, is that of sd and sdxl and lcm"),
        ("StableDiffusionUpscalePipeline", "a UNet2DConditionModel, is that of sd and sdxl and lcm"),
        ("FluxPriorReduxPipeline", r"the nearest is Flux\w+ \(flux\)"),
        ("ZImageOmniPipeline", "a ZImageTransformer2DModel, is that of z_image;"),
    ],
)
def test_an_unknown_pipeline_names_the_families_of_its_denoiser(pipeline, said):
    for known_as in (pipeline, getattr(diffusers, pipeline)):
        with pytest.raises(UnknownFamilyError, match=f"no family is recorded for {pipeline};.* {said}"):
            family_of(known_as)


def test_an_unknown_pipeline_at_hand_names_the_one_family_that_has_its_denoiser():
    class Mine(diffusers.DiffusionPipeline):
        def __init__(self, unet):
            super().__init__()
            self.register_modules(unet=unet)

    with pytest.raises(UnknownFamilyError, match=r"for Mine; .* UNet2DConditionModel, is that of sdxl; .*sdxl\.py"):
        family_of(Mine(FAMILIES["sdxl"].tiny().components["unet"]))


def test_an_unknown_variant_and_an_unknown_component_are_named():
    with pytest.raises(InputError, match=r"sdxl has no variant 'huge'; it has base"):
        FAMILIES["sdxl"].full("huge")
    with pytest.raises(InputError, match=r"sdxl has no component 'ears'; it has denoiser, vae, text_encoder"):
        FAMILIES["sdxl"].full(component="ears", device="meta")


def test_listing_the_families_imports_no_torch():
    program = "import sys, vivace.families; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
