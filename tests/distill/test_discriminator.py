"""The discriminator's shapes, and Wasserstein's clipping."""

import pytest
import torch

from vivace.distill.discriminator import clamp, make_discriminator


@pytest.mark.parametrize(
    ("channels", "side", "count"), [(1280, 32, 4), (1280, 8, 3), (192, 16, 3), (32, 4, 2), (8, 1, 2)]
)
def test_a_map_becomes_one_logit(channels, side, count):
    made = make_discriminator(channels, side, width=8)
    assert made(torch.randn(3, channels, side, side)).shape == (3, 1)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in made) == count


@pytest.mark.parametrize(
    ("side", "layers"),
    [
        (8, [(3, 1, 8), "SiLU", (4, 2, 16), "GroupNorm", "SiLU", (4, 1, 1), "Flatten"]),  # SD 1.5's mid block
        (
            32,
            [(4, 2, 8), "SiLU", (4, 2, 16), "GroupNorm", "SiLU", (4, 2, 32), "GroupNorm", "SiLU", (4, 1, 1), "Flatten"],
        ),
    ],
)
def test_layers_are_those_of_the_backbones(side, layers):
    """Kernel, stride and width of each convolution, as Flash Diffusion has them for SD 1.5 and SDXL."""
    found = [
        (layer.kernel_size[0], layer.stride[0], layer.out_channels)
        if isinstance(layer, torch.nn.Conv2d)
        else type(layer).__name__
        for layer in make_discriminator(1280, side, width=8)
    ]
    assert found == layers


def test_longer_maps_give_several():
    assert make_discriminator(16, 16, width=8)(torch.randn(2, 16, 16, 32)).shape[0] == 2
    assert make_discriminator(16, 16, width=8)(torch.randn(2, 16, 16, 32)).shape[1] > 1


def test_widths_double_and_stop():
    made = make_discriminator(4, 256, width=8)
    widths = [layer.out_channels for layer in made if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [8, 16, 32, 64, 64, 64, 1]


def test_clamp():
    made = make_discriminator(4, 8, width=8)
    clamp(made, 0.01)
    assert max(float(parameter.detach().abs().max()) for parameter in made.parameters()) <= 0.01
