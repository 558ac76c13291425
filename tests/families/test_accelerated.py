"""Every pipeline of the families with fused blocks: accelerated, it draws what the stock one draws, and comes back."""

import pytest
import torch

import vivace
from vivace.families import FAMILIES
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
}


def cases():
    for family, pipeline in CASES:
        marks = () if pipeline in OFTEN else pytest.mark.full
        yield pytest.param(family, pipeline, id=pipeline, marks=marks)


@pytest.mark.parametrize(("family", "pipeline"), [*cases()])
def test_draws_the_same(family, pipeline, quick):
    def picture():
        torch.manual_seed(0)  # some pipelines draw without their generator
        return torch.as_tensor(quick(pipe)[0])

    pipe = FAMILIES[family].tiny(pipeline)
    stock = picture()
    vivace.accelerate(pipe)
    fast = picture()
    (calls,) = vivace.report(pipe).calls.values()
    vivace.restore(pipe)
    aside = next((reason for name, reason in ASIDE.items() if name in pipeline), None)
    if aside:
        assert any(aside in reason for reason in calls)
    else:
        assert set(calls) == {"fused blocks"}
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-3)
    assert torch.equal(picture(), stock)
