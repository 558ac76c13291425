"""The pipeline class for the inputs at hand."""

import diffusers
import pytest

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.family import family_of
from vivace.inputs import arguments, choose, no_step, size_arguments, unheard
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
        ("FluxKontextPipeline", "image mask", None, "FluxKontextInpaintPipeline"),
        ("FluxKontextInpaintPipeline", "image", None, "FluxKontextPipeline"),
        ("FluxFillPipeline", "image mask", None, "FluxFillPipeline"),
        ("FluxControlPipeline", "control", None, "FluxControlPipeline"),
        ("StableDiffusionXLPipeline", "control", "ControlNetUnionModel", "StableDiffusionXLControlNetUnionPipeline"),
        ("QwenImageEditPipeline", "image", None, "QwenImageEditPipeline"),
        ("QwenImageEditPipeline", "image mask", None, "QwenImageEditInpaintPipeline"),
        ("StableDiffusionInpaintPipeline", "image", None, "StableDiffusionImg2ImgPipeline"),
        ("Flux2KleinPipeline", "image mask", None, "Flux2KleinInpaintPipeline"),
        ("FluxPipeline", "control", "FluxControlNetModel", "FluxControlNetPipeline"),
        ("StableVideoDiffusionPipeline", "image", None, "StableVideoDiffusionPipeline"),
        ("WanImageToVideoPipeline", "image", None, "WanImageToVideoPipeline"),
        ("WanVideoToVideoPipeline", "", None, "WanPipeline"),
        ("WanVACEPipeline", "", None, "WanVACEPipeline"),
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
        ("Flux2Pipeline", "image mask", "Flux2Pipeline cannot take --image and --mask"),
        ("StableVideoDiffusionPipeline", "", "needs --image too"),
        ("QwenImageLayeredPipeline", "image", "makes several pictures of one"),
        ("StableDiffusionPipeline", "control", "needs --controlnet with --control-image"),
        ("StableDiffusion3ControlNetInpaintingPipeline", "control", "needs a mask of its control image"),
    ],
)
def test_no_class(own, wanted, said):
    with pytest.raises(InputError, match=said):
        choose(source(own), set(wanted.split()))


def test_a_model_with_a_control_model_of_its_own_uses_it():
    parts = {key: ["", ""] for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker")}
    parts |= {"feature_extractor": ["", ""], "controlnet": ["diffusers", "ControlNetModel"]}
    own = source("StableDiffusionControlNetPipeline", **parts)
    assert choose(own, {"control"}).__name__ == "StableDiffusionControlNetPipeline"
    assert choose(own, {"control", "image"}).__name__ == "StableDiffusionControlNetImg2ImgPipeline"
    with pytest.raises(InputError, match="needs --control-image too"):
        choose(own, set())


READS = {
    "FluxFillPipeline": ("fill", {"image"}, "--mask"),
    "FluxControlPipeline": ("canny", set(), "--control-image"),
    "StableDiffusionInpaintPipeline": ("1.5-inpaint", {"image"}, "--mask"),
    "StableDiffusionXLInpaintPipeline": ("inpaint", set(), "--image and --mask"),
}


@pytest.mark.parametrize(("own", "variant", "wanted", "said"), [(own, *rest) for own, rest in READS.items()])
def test_a_denoiser_with_channels_for_pictures_runs_in_no_loop_without_them(own, variant, wanted, said):
    family = family_of(own)
    known = {"pipeline": own, "family": family, "denoiser": family.variant(variant).denoiser}
    with pytest.raises(InputError, match=f"needs {said} too"):
        choose(Source(name="model", path=None, **known), wanted)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_first_model_of_a_family_needs_no_more_than_its_class_says(family):
    first = Source(
        name="model", path=None, pipeline=family.pipelines[0], family=family, denoiser=family.variant().denoiser
    )
    wanted = {"image"} if family.name == "svd" else set()
    assert choose(first, wanted).__name__ == family.pipelines[0]


def test_a_size_is_told_in_all_that_a_class_takes_it_by():
    assert size_arguments((768, 512), {"width", "height"}) == {"width": 768, "height": 512}
    kontext = {"width": 768, "height": 512, "max_area": 768 * 512}
    assert size_arguments((768, 512), arguments(diffusers.FluxKontextPipeline)) == kontext
    assert size_arguments((768, 512), {"prompt"}) == {}


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


@pytest.mark.parametrize(
    ("pipeline", "call", "argument"),
    [
        ("FluxPipeline", {"negative_prompt": "red"}, "negative_prompt"),  # its own true guidance is 1
        ("FluxPipeline", {"negative_prompt": "red", "true_cfg_scale": 4.0}, None),
        ("FluxPipeline", {"negative_prompt": ""}, None),
        ("QwenImagePipeline", {"negative_prompt": "red"}, None),  # and this one's 4
        ("QwenImagePipeline", {"true_cfg_scale": 4.0}, "true_cfg_scale"),
        ("QwenImagePipeline", {"true_cfg_scale": 1.0}, None),
        ("StableDiffusion3Pipeline", {"negative_prompt": "red"}, None),
        ("StableDiffusion3Pipeline", {"negative_prompt": "red", "guidance_scale": 1.0}, "negative_prompt"),
        ("StableVideoDiffusionPipeline", {}, None),
    ],
)
def test_what_a_pipeline_would_not_hear(pipeline, call, argument):
    found = unheard(getattr(diffusers, pipeline), call, silent=1.0)
    assert (found and found[0]) == argument
