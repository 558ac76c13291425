"""A stack of linears computes them all, shares their storage, and gives it back."""

from contextlib import ExitStack

import pytest
import torch

from vivace.fused.stack import Stack
from vivace.quant import format_of
from vivace.quant.linear import QuantLinear


def test_shares_storage_until_the_undo():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(6, width) for width in (4, 3)]
    before = [linear.weight.detach().clone() for linear in linears]
    x = torch.randn(2, 6)
    with ExitStack() as undo:
        stack = Stack(linears, undo=undo)
        torch.testing.assert_close(stack(x), torch.cat([linear(x) for linear in linears], dim=-1))
        assert linears[1].weight.untyped_storage().data_ptr() == stack.weight.untyped_storage().data_ptr()
    for linear, weight in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, weight)
        assert linear.weight.untyped_storage().nbytes() == weight.nbytes


def test_a_parameter_that_was_cast_keeps_its_new_storage():
    linears = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)]
    with ExitStack() as undo:
        Stack(linears, undo=undo)
        linears[0].double()
        cast = linears[0].weight.data_ptr()
    assert linears[0].weight.data_ptr() == cast
    assert linears[0].weight.dtype == torch.float64


@pytest.mark.parametrize("formats", [("fp8", "fp8"), ("fp8", None), ("fp8", "int8_weights"), (None, None)])
def test_linears_of_any_kinds(formats):
    torch.manual_seed(0)
    linears = [torch.nn.Linear(64, 32) for _ in formats]
    parts = [
        linear if format is None else QuantLinear.of(linear, format=format_of(format))
        for linear, format in zip(linears, formats, strict=True)
    ]
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        apart = torch.cat([part(x) for part in parts], -1)
        with ExitStack() as undo:
            stack = Stack(parts, undo=undo)
            torch.testing.assert_close(stack(x), apart, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stack.part(slice(1, 2))(x), apart[..., 32:], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stack.part(slice(0, 1))(x), apart[..., :32], rtol=1e-5, atol=1e-5)
            assert stack.takes == ("fp8" if formats == ("fp8", "fp8") else None)
        torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), apart)
