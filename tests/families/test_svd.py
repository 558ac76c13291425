"""The video UNet's Split."""

import pytest
import torch

from vivace.families import svd


@pytest.fixture(scope="module")
def unet():
    return svd.tiny().unet


@pytest.mark.parametrize("size", [(64, 64), (72, 40)])
@pytest.mark.parametrize("frames", [1, 3])
def test_sizes_that_doubling_does_not_hit(unet, size, frames, assert_split_is_forward):
    kwargs = svd.inputs(unet, size=size, frames=frames)
    assert kwargs["sample"].shape == (2, frames, 8, size[1] // 8, size[0] // 8)
    assert_split_is_forward(unet, kwargs, family=svd.SVD)


@pytest.mark.parametrize("timestep", [3, 0.25, torch.tensor(0.25), torch.tensor([1.5])])
def test_every_form_of_time(unet, timestep, assert_split_is_forward):
    kwargs = svd.inputs(unet, size=(64, 64), frames=2) | {"timestep": timestep}
    assert_split_is_forward(unet, kwargs, family=svd.SVD)
