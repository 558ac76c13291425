"""Widened parts do what the narrow ones did, whatever the further channels hold."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def modules(recipe) -> tuple[ModuleType, ModuleType]:
    return recipe("parts"), recipe("widen")


@torch.no_grad()
def test_a_widened_transformer_predicts_the_same(modules):
    parts, widen = modules
    torch.manual_seed(0)
    narrow = parts.transformer().eval()
    wide = widen.widened_transformer(narrow, 16)
    x = torch.randn(1, 16, 32, 32)
    call = {
        "encoder_hidden_states": torch.randn(1, 5, 192),
        "pooled_projections": torch.randn(1, 192),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    found, expected = wide(x, **call)[0], narrow(x[:, :8], **call)[0]
    torch.testing.assert_close(found[:, :8], expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().amax() > 0.01
    assert not found[:, 8:].any()


@torch.no_grad()
def test_a_widened_autoencoder_writes_and_reads_the_same(modules):
    parts, widen = modules
    torch.manual_seed(0)
    narrow = parts.autoencoder().eval().half()
    wide = widen.widened_autoencoder(narrow, 16)
    assert wide.dtype == torch.float16
    narrow, wide = narrow.float(), wide.float()
    pictures, z = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 16, 8, 8)
    found = wide.encode(pictures).latents
    torch.testing.assert_close(found[:, :8], narrow.encode(pictures).latents, rtol=1e-5, atol=1e-6)
    assert not found[:, 8:].any()
    torch.testing.assert_close(wide.decode(z).sample, narrow.decode(z[:, :8]).sample, rtol=1e-5, atol=1e-6)
