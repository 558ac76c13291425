"""The teacher as the config names it; what cannot be is refused before weights are read."""

import dataclasses

import pytest
import torch

from vivace.distill import teacher
from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.load import Source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SDXL, and a T2I-Adapter for it."""
    root = tmp_path_factory.mktemp("teachers")
    pipe = FAMILIES["sdxl"].tiny("StableDiffusionXLAdapterPipeline")
    pipe.adapter.save_pretrained(root / "adapter")
    FAMILIES["sdxl"].tiny().save_pretrained(root / "sdxl")
    return root


def test_a_folder(config, folders):
    found = teacher.load_teacher(config(teacher=str(folders / "sdxl")), device=CPU)
    assert type(found).__name__ == "StableDiffusionXLPipeline"
    assert found.unet.dtype == torch.float32


def test_with_a_control_model_in_bfloat16(config, folders):
    chosen = config(
        teacher=str(folders / "sdxl"),
        pipeline="StableDiffusionXLAdapterPipeline",
        control=str(folders / "adapter"),
        precision="bfloat16",
    )
    found = teacher.load_teacher(chosen, device=CPU)
    assert type(found).__name__ == "StableDiffusionXLAdapterPipeline"
    assert {found.unet.dtype, found.adapter.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pipeline": "StableDiffusionXLAdapterPipeline"}, "takes a control model"),
        ({"control": "x/y"}, "takes no control model"),
        (
            {"pipeline": "StableDiffusionXLControlNetPipeline", "control": "{root}"},
            "no config.json that names its class",
        ),
        ({"pipeline": "Nothing"}, "no pipeline 'Nothing'"),
        (
            {"pipeline": "StableDiffusionXLControlNetPipeline", "control": "/nowhere"},
            "no folder /nowhere with a control model; check the key control",
        ),
        (
            {"pipeline": "StableDiffusionXLControlNetPipeline", "control": "nobody/nothing"},
            r"no control model nobody/nothing here, and none from the hub \(.+\); check the key control",
        ),
    ],
)
def test_what_cannot_be(config, folders, fields, said):
    named = {name: value.format(root=folders) for name, value in fields.items()}
    with pytest.raises(InputError, match=said):
        teacher.load_teacher(config(teacher=str(folders / "sdxl"), **named), device=CPU)


def test_a_model_that_was_made_without_guidance(config, monkeypatch):
    schnell = FAMILIES["flux"].variants["schnell"]
    source = Source(name="s", path=None, pipeline="FluxPipeline", family=FAMILIES["flux"], variant=schnell)
    monkeypatch.setattr(teacher, "find", lambda name: source)
    with pytest.raises(InputError, match=r"made without guidance, and stages ask for 4; give \[1, 1\]"):
        teacher.load_teacher(config(teacher="black-forest-labs/FLUX.1-schnell"), device=CPU)
    # With [1, 1] it is not guidance that stops it.
    stages = tuple(dataclasses.replace(stage, guidance=(1.0, 1.0)) for stage in config().stages)
    with pytest.raises(InputError, match="takes no control model"):
        teacher.load_teacher(config(teacher="x/y", stages=stages, control="z"), device=CPU)
