"""A stack of linears computes them all, shares their storage, and gives it back."""

from contextlib import ExitStack

import pytest
import torch

from vivace.fused.stack import Stack
from vivace.lora.adapters import Factor
from vivace.lora.side import Side
from vivace.one_off import give_class
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


def adapted(linear, *, rank):
    """Random adapters beside a linear; what they add to its output for an input, in fp32."""
    side = Side(linear, capacity=16, device=torch.device("cpu"))
    down, up = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
    side.fill([Factor(adapter="a", down=down, up=up, bias=torch.randn(linear.out_features), scale=0.5)], 1.0)
    give_class(linear, {"vivace_side": side})
    return side, lambda x: x @ side.down.t() @ side.up.t() + side.bias


@pytest.mark.parametrize("format", [None, "int8_weights"])
def test_adapters_of_neighbours_are_added_together(format):
    """Of two sizes, and with one linear in between that has none."""
    torch.manual_seed(0)
    linears = [torch.nn.Linear(64, width) for width in (32, 32, 16, 16, 48)]
    if format is not None:
        linears = [QuantLinear.of(linear, format=format_of(format)) for linear in linears]
    there = {index: adapted(linears[index], rank=3 + index) for index in (0, 1, 3, 4)}
    x, undo = torch.randn(2, 5, 64), ExitStack()
    own = [linear(x) for linear in linears]
    wanted = [y + there[index][1](x) if index in there else y for index, y in enumerate(own)]
    places = [side.up.data_ptr() for side, _ in there.values()]
    with torch.no_grad(), undo:
        stack = Stack(linears, undo=undo)
        torch.testing.assert_close(stack(x), torch.cat(wanted, -1), rtol=1e-4, atol=1e-4)
        assert [len(run.up) for run in stack._adapters.runs] == [2, 1, 1]
        for part in (slice(0, 1), slice(1, 3), slice(1, 5), slice(3, 5)):
            torch.testing.assert_close(stack.part(part)(x), torch.cat(wanted[part], -1), rtol=1e-4, atol=1e-4)
        assert stack.part(slice(2, 3))._adapters is None
        for side, _ in there.values():
            side.up.zero_()
            side.bias.zero_()
        torch.testing.assert_close(stack(x), torch.cat(own, -1), rtol=1e-4, atol=1e-4)
        assert places != [side.up.data_ptr() for side, _ in there.values()]
    assert all(
        side.up.is_contiguous() and side.up.untyped_storage().nbytes() == side.up.nbytes for side, _ in there.values()
    )
