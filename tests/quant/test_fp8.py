"""fp8 products at few rows: a prompt of a few words, as the negative one of Qwen-Image, goes through every layer."""

import pytest
import torch

from vivace.quant import format_of, fp8
from vivace.quant.linear import QuantLinear

# Inputs and outputs of the families' products with the most inputs, and of a text encoder's.
LONG = [(12288, 3072), (15360, 3072), (13824, 5120), (14336, 3072), (18944, 3584), (8960, 1536), (6144, 1536)]


def layer(inputs: int, outputs: int, *, how: str, device: str) -> QuantLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, device=device, dtype=torch.bfloat16).requires_grad_(False)
    return QuantLinear.of(linear, format=format_of("fp8"), how=how)


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), LONG)
@pytest.mark.parametrize("how", ["rowwise", "rowwise, exact accumulation", "tensorwise"])
def test_every_number_of_rows_has_a_kernel(inputs, outputs, how):
    quantised = layer(inputs, outputs, how=how, device="cuda")
    many = torch.randn(300, inputs, device="cuda", dtype=torch.bfloat16)
    exact = many.float() @ quantised.dequantised().float().T + quantised.bias.float()
    for rows in (*range(1, 161), 255, 256, 300):
        error = (quantised(many[:rows]).float() - exact[:rows]).norm() / exact[:rows].norm()
        assert error < 0.05, f"{rows} rows"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("rows", "fast"), [(1, False), (fp8.FEW_ROWS - 1, False), (fp8.FEW_ROWS, True)])
def test_few_rows_accumulate_exactly(monkeypatch, rows, fast):
    asked = []

    def product(values, weight, *, use_fast_accum, out_dtype, **scales):
        asked.append(use_fast_accum)
        return torch.zeros(len(values), weight.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    layer(64, 32, how="rowwise", device="cpu")(torch.randn(rows, 64, dtype=torch.bfloat16))
    assert asked == [fast]
