"""Rows in 8 bits: the asymmetric int8 form, and rows that leave nothing to scale."""

import pytest
import torch

from vivace.kernels.join_activate import join_activate
from vivace.kernels.quant_rows import quant_rows


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_dense_is_what_was_meant(quantize):
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(2, 9, 200))
    rows = quant_rows(x, quantize=quantize)
    # int8 has 255 steps in all between the ends of a row; fp8 four significant bits each.
    allowed = (x.aminmax(dim=-1, keepdim=True).max - x.amin(-1, keepdim=True)) / 509 if quantize == "int8" else 0
    assert ((rows.dense() - x).abs() <= allowed + (x.abs() / 15.9 + 1e-3 if quantize == "fp8" else 0)).all()
    assert rows.scales.shape == (2, 9, 1 if quantize == "fp8" else 2)


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
@pytest.mark.parametrize("value", [0.0, 7.3, -1e-3, 3e4])
def test_a_constant_row_divides_by_nothing(quantize, value):
    rows = quant_rows(torch.full((3, 64), value), quantize=quantize)
    torch.testing.assert_close(rows.dense(), torch.full((3, 64), value), rtol=1e-6, atol=1e-9)


def test_int8_uses_all_steps_of_a_one_sided_row():
    values = quant_rows(torch.linspace(0, 5, 256)[None], quantize="int8").values
    assert sorted(values.flatten().tolist()) == list(range(-128, 128))


def test_a_row_of_int8_with_a_nan_is_one_of_nans():
    """Else what a model overflowed in would come out of the next linear as numbers."""
    x, plain = torch.ones(2, 3, 64), torch.rand(2, 3, 64)
    x[0, 1, 5] = torch.nan
    made = quant_rows(x, quantize="int8"), *(join_activate(*both, quantize="int8") for both in ((x, plain), (plain, x)))
    for rows in made:
        dense = rows.dense()
        assert dense[0, 1].isnan().all()
        dense[0, 1] = 0
        assert dense.isfinite().all()
