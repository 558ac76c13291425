"""Noise for benchmark inputs: on the denoiser's device, in its dtype, the same for the same seed."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from vivace.families import flux
from vivace.families.noise import noise_for, only_stills


def test_noise_follows_the_denoiser_and_the_seed():
    denoiser = FluxTransformer2DModel(**flux.TINY).to(torch.bfloat16)
    first, again, other = (noise_for(denoiser, seed=seed)(2, 3) for seed in (0, 0, 1))
    assert first.shape == (2, 3)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_stills_names_the_family_and_the_frames():
    only_stills("FLUX.1", 1)
    with pytest.raises(ValueError, match=r"FLUX\.1 draws single pictures, got frames=5; pass frames=1"):
        only_stills("FLUX.1", 5)
