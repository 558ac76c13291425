"""Patches as one product are what diffusers' PatchEmbed makes, at every size it takes."""

import copy

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed

from vivace.fused.patches import places_of, tokens_of


def embedding(**more):
    torch.manual_seed(0)
    return PatchEmbed(height=16, width=16, patch_size=2, in_channels=4, embed_dim=32, **more)


@pytest.mark.parametrize("more", [{}, {"pos_embed_max_size": 12}, {"pos_embed_type": None}], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=str)
def test_as_stock(more, size):
    embed, x = embedding(**more), torch.randn(3, 4, *size)
    with torch.no_grad():
        places = places_of(embed, x)
        made = tokens_of(embed, x, places)
        torch.testing.assert_close(made, embed(x))
    assert places.shape == (1, made.shape[1], 32)
    assert made.is_contiguous()


@pytest.mark.parametrize("more", [{}, {"pos_embed_max_size": 12}], ids=str)
def test_no_further_from_fp64_than_stock_in_16_bit(more):
    embed, x = embedding(**more).bfloat16(), torch.randn(2, 4, 16, 16).bfloat16()
    with torch.no_grad():
        right = copy.deepcopy(embed).double()(x.double())
        ours, stock = tokens_of(embed, x, places_of(embed, x)), embed(x)
    assert ours.dtype == torch.bfloat16
    assert (ours - right).norm() <= 1.1 * (stock - right).norm()


def test_what_is_more_than_a_convolution_is_left_to_the_model():
    x = torch.randn(1, 4, 16, 16)
    assert places_of(embedding(layer_norm=True), x) is None
    assert places_of(embedding(), torch.randn(1, 4, 15, 16)) is None
    wrapped = embedding()
    wrapped.proj = type("Wrapped", (torch.nn.Conv2d,), {})(4, 32, 2, 2)
    assert places_of(wrapped, x) is None
    with torch.no_grad():
        torch.testing.assert_close(tokens_of(wrapped, x, None), wrapped(x))
