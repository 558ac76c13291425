"""The errors of single layers: of the size their format has, and of the layer that has them."""

import pytest
import torch

from vivace.families import FAMILIES
from vivace.quant import format_of
from vivace.quant.error import by_kind, layer_errors
from vivace.quant.layers import linears, survey

pytestmark = pytest.mark.usefixtures("interpreted")
FAMILY = FAMILIES["flux"]


@pytest.fixture(scope="module")
def denoiser():
    return FAMILY.tiny().transformer


def errors(denoiser, format: str) -> dict[str, float]:
    layers = survey(
        denoiser,
        format=format_of(format),
        device=torch.device("cpu"),
        keep=FAMILY.keep_16bit,
        one_row=FAMILY.one_row,
        all_that_fit=True,
    )
    arguments = FAMILY.inputs(denoiser, size=(64, 64), batch=2, frames=1, text_tokens=8, seed=0)
    found = layer_errors(denoiser, arguments, layers=layers)
    assert set(found) == {layer.name for layer in layers if layer.format}
    modulation = [error for name, error in found.items() if "norm" in name]
    assert len(modulation) == 7
    assert all(0.001 < error < 0.012 for error in modulation), modulation
    return {name: error for name, error in found.items() if "norm" not in name}


@pytest.mark.parametrize(("format", "low", "high"), [("fp8", 0.02, 0.06), ("int8", 0.004, 0.025)])
def test_of_the_size_of_the_format(denoiser, format, low, high):
    found = errors(denoiser, format)
    assert all(low < error < high for error in found.values()), found
    assert not any(module._forward_hooks for _, module in linears(denoiser))


def test_the_layer_with_outliers_stands_out(denoiser):
    # One input a thousand times the others: int8 has no steps left for those.
    norm = denoiser.transformer_blocks[0].attn.to_q
    kept = norm.weight.detach().clone()
    norm.weight.data[:, 0] *= 1000
    found = errors(denoiser, "int8")
    norm.weight.data = kept
    assert max(found, key=found.get) == "transformer_blocks.0.attn.to_q"


def test_by_kind():
    found = by_kind({"blocks.0.up": 0.1, "blocks.11.up": 0.3, "blocks.0.net.2": 0.2, "last": 0.05})
    assert found == {"blocks.*.up": 0.3, "blocks.*.net.2": 0.2, "last": 0.05}
