"""Every pipeline of the families with fused blocks: accelerated, it draws what the stock one draws, and comes back."""

import inspect

import pytest
import torch

import vivace
from vivace.accelerate import acceleration_of
from vivace.families import FAMILIES
from vivace.family import Split
from vivace.fused import FUSED

CASES = [(family, pipeline) for family in FUSED for pipeline in FAMILIES[family].pipelines]
# Perturbed attention exchanges some processors for the length of the call; references may be kept from step to step.
ASIDE = {"PAG": "PAG", "KV": "keys and values"}
FIRST = {FAMILIES[family].pipelines[0] for family in FUSED}
OFTEN = FIRST | {
    "FluxKontextPipeline",
    "FluxControlNetPipeline",
    "FluxInpaintPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusion3ControlNetPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageControlNetPipeline",
    "ZImageControlNetPipeline",
    "WanImageToVideoPipeline",
}


def cases():
    for family, pipeline in CASES:
        marks = () if pipeline in OFTEN else pytest.mark.full
        yield pytest.param(family, pipeline, id=pipeline, marks=marks)


@pytest.mark.parametrize(("family", "pipeline"), [*cases()])
def test_draws_the_same(family, pipeline, quick):
    def picture():
        torch.manual_seed(0)  # some pipelines draw without their generator
        return torch.as_tensor(quick(pipe)[0][0])

    pipe = FAMILIES[family].tiny(pipeline)
    stock = picture()
    vivace.accelerate(pipe)
    fast = picture()
    calls = vivace.report(pipe).calls.values()  # of one denoiser or two
    vivace.restore(pipe)
    aside = next((reason for name, reason in ASIDE.items() if name in pipeline), None)
    if aside:
        assert any(aside in reason for each in calls for reason in each)
    else:
        assert all(set(each) == {"fused blocks"} for each in calls)
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-3)
    assert torch.equal(picture(), stock)


def test_skip_layer_guidance(quick):
    """SD 3.5's third call of some steps, with blocks left out, is served as the others are."""
    pipe = FAMILIES["sd3"].tiny()
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    plain, stock = quick(pipe)[0], quick(pipe, **skipping)[0]
    vivace.accelerate(pipe)
    fast = quick(pipe, **skipping)[0]
    (calls,) = vivace.report(pipe).calls.values()
    assert set(calls) == {"fused blocks"}
    assert not torch.allclose(stock, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FUSED)
def test_what_does_not_depend_on_the_step_is_computed_once_per_prompt(name, quick):
    pipe = FAMILIES[name].tiny()
    vivace.accelerate(pipe)
    made, prepare = [], Split.prepare
    counted = type("Counted", (Split,), {"prepare": lambda s, kw: (made.append(1), prepare(s, kw))[1]})
    for lane in acceleration_of(pipe).target.lanes.values():
        lane.split = counted(**vars(lane.split))
    # Guidance: in one call with captions of two lengths, or in two calls.
    taken = {"negative": {"negative_prompt": "nothing"}, "true_cfg": {"true_cfg_scale": 3.0}}
    given = {k: v for word, extra in taken.items() if word in FAMILIES[name].takes for k, v in extra.items()}
    # With a picture to edit FLUX.2's pipeline joins the positions anew at every step.
    image = inspect.signature(pipe.__call__).parameters.get("image")
    given |= {"image": None} if image is not None and image.default is None else {}
    quick(pipe, num_inference_steps=3, **given)
    calls = [each for each in vivace.report(pipe).calls.values() if each]  # of one denoiser or two
    assert all(set(each) == {"fused blocks"} for each in calls)
    assert len(made) == len(calls) * sum(each["fused blocks"] for each in calls) / 3
