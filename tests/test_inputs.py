"""The pipeline class for the inputs at hand."""

import diffusers
import pytest

from vivace.errors import InputError
from vivace.family import family_of
from vivace.inputs import choose, no_step
from vivace.load import Source


def source(pipeline: str, **index: object) -> Source:
    return Source(name="model", path=None, pipeline=pipeline, family=family_of(pipeline), index=index)


@pytest.mark.parametrize(
    ("own", "wanted", "control", "expected"),
    [
        ("StableDiffusionPipeline", "", None, "StableDiffusionPipeline"),
        ("StableDiffusionPipeline", "image", None, "StableDiffusionImg2ImgPipeline"),
        ("StableDiffusionImg2ImgPipeline", "", None, "StableDiffusionPipeline"),
        ("StableDiffusionPipeline", "control", "ControlNetModel", "StableDiffusionControlNetPipeline"),
        ("StableDiffusionPipeline", "control", "T2IAdapter", "StableDiffusionAdapterPipeline"),
        ("StableDiffusionXLPipeline", "image mask", None, "StableDiffusionXLInpaintPipeline"),
        ("StableDiffusionXLPipeline", "image control", "ControlNetModel", "StableDiffusionXLControlNetImg2ImgPipeline"),
        ("StableDiffusion3Pipeline", "image", None, "StableDiffusion3Img2ImgPipeline"),
        ("StableDiffusion3Pipeline", "image mask", None, "StableDiffusion3InpaintPipeline"),
        ("FluxPipeline", "image", None, "FluxImg2ImgPipeline"),
        ("FluxPipeline", "image mask", None, "FluxInpaintPipeline"),
        ("FluxKontextPipeline", "image", None, "FluxKontextPipeline"),
        ("FluxFillPipeline", "image mask", None, "FluxFillPipeline"),
        ("FluxControlPipeline", "control", None, "FluxControlPipeline"),
        ("StableDiffusionXLPipeline", "control", "ControlNetUnionModel", "StableDiffusionXLControlNetUnionPipeline"),
        ("QwenImageEditPipeline", "image", None, "QwenImageEditPipeline"),
        ("FluxPipeline", "control", "FluxControlNetModel", "FluxControlNetPipeline"),
        ("StableVideoDiffusionPipeline", "image", None, "StableVideoDiffusionPipeline"),
        ("WanImageToVideoPipeline", "image", None, "WanImageToVideoPipeline"),
    ],
)
def test_choice(own, wanted, control, expected):
    assert choose(source(own), set(wanted.split()), control_class=control).__name__ == expected


def test_a_denoiser_that_needs_no_channels_for_a_picture_takes_one():
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler", "transformer"))
    found = choose(source("WanPipeline", expand_timesteps=True, **parts), {"image"})
    assert found.__name__ == "WanImageToVideoPipeline"


@pytest.mark.parametrize(
    ("own", "wanted", "said"),
    [
        ("PixArtSigmaPipeline", "image", "cannot take --image"),
        ("WanPipeline", "image", "cannot take --image"),
        ("StableVideoDiffusionPipeline", "", "needs --image too"),
        ("QwenImageLayeredPipeline", "image", "makes several pictures of one"),
        ("StableDiffusionPipeline", "control", "needs --controlnet with --control-image"),
    ],
)
def test_no_class(own, wanted, said):
    with pytest.raises(InputError, match=said):
        choose(source(own), set(wanted.split()))


@pytest.mark.parametrize(
    ("pipeline", "call", "prediction", "left"),
    [
        ("StableDiffusionXLImg2ImgPipeline", {"num_inference_steps": 3}, "epsilon", False),  # its own strength is 0.3
        ("StableDiffusionXLImg2ImgPipeline", {"num_inference_steps": 4}, "epsilon", True),
        ("StableDiffusionXLImg2ImgPipeline", {"strength": 0.01}, "epsilon", False),  # of 50 steps
        ("FluxImg2ImgPipeline", {"num_inference_steps": 1}, "flow", True),  # as its loop rounds
        ("FluxImg2ImgPipeline", {"num_inference_steps": 4, "strength": 0.1}, "flow", False),
        ("StableDiffusionXLPipeline", {"num_inference_steps": 1}, "epsilon", True),
    ],
)
def test_a_strength_that_leaves_no_step(pipeline, call, prediction, left):
    assert (no_step(getattr(diffusers, pipeline), call, prediction=prediction) is None) == left
