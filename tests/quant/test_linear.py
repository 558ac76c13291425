"""A quantised linear stands for its original in every way but the last digits, and in none across samples."""

import copy
from contextlib import ExitStack
from math import inf, nan

import pytest
import torch

from vivace.kernels.few_rows_linear import MOST, few_rows_linear
from vivace.kernels.quant_rows import quant_rows
from vivace.quant import FORMATS, format_of
from vivace.quant.linear import QuantLinear, stacked

# Relative errors of a product of normal values: what the bits allow, with a third of slack.
pytestmark = pytest.mark.usefixtures("interpreted")
ALLOWED = {"fp8": 0.05, "int8": 0.016, "fp8_weights": 0.036, "int8_weights": 0.009, "int4_weights": 0.12}


def linear(inputs: int = 192, outputs: int = 80, *, bias: bool = True, dtype=torch.float32) -> torch.nn.Linear:
    torch.manual_seed(1)
    made = torch.nn.Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(made.weight)
    # Channels of very different size: one scale for all of them would lose the small ones in int8.
    made.weight.data *= torch.logspace(-2, 1, outputs)[:, None]
    return made.to(dtype).requires_grad_(False)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, by output channel, averaged."""
    return ((got.double() - exact.double()).norm(dim=(0, 1)) / exact.double().norm(dim=(0, 1))).mean().item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_close_to_the_original(name, bias):
    original = linear(bias=bias)
    x = torch.randn(2, 33, 192)
    layer = QuantLinear.of(original, format=format_of(name))
    out = layer(x)
    assert (out.shape, out.dtype) == ((2, 33, 80), torch.float32)
    assert 1e-4 < error(out, original(x)) < ALLOWED[name]
    assert layer.nbytes < 0.33 * sum(p.nbytes for p in original.parameters())
    # The weight that is multiplied with is the one it shows.
    seen = torch.nn.functional.linear(x, layer.dequantised(), layer.bias)
    assert error(out, seen) < (1e-5 if name.endswith("weights") else ALLOWED[name])


@pytest.mark.parametrize("inputs", [192, 77])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_multiplied_with_the_int8_weight_as_it_is(inputs, bias):
    original = linear(inputs=inputs, bias=bias)
    layer = QuantLinear.of(original, format=format_of("int8_weights"))
    x = torch.randn(MOST + 1, inputs)
    many = layer(x)
    assert error(many[None], original(x)[None]) < ALLOWED["int8_weights"]
    for rows in (1, 3, MOST):
        few = layer(x[:rows])
        assert (few.shape, few.dtype) == ((rows, 80), torch.float32)
        # On the CPU the input is rounded to bf16 for torch's own kernel.
        assert error(few[None], many[None, :rows]) < 0.008
        on_a_gpu = few_rows_linear(x[:rows], layer.values, scales=layer.scales, bias=layer.bias)
        torch.testing.assert_close(on_a_gpu, many[:rows], rtol=1e-5, atol=1e-4)
    assert layer(x[None, None, :2]).shape == (1, 1, 2, 80)
    torch.testing.assert_close(layer(x[:3].t().contiguous().t()), layer(x[:3]))
    with pytest.raises(ValueError, match="x must be"):
        few_rows_linear(x[None], layer.values, scales=layer.scales)
    for wrong in ({"made": torch.empty(3, 80)}, {"made": torch.empty(3, 79), "found": torch.ones(3, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=r"made must be \[3, 80\] and found \[3\]"):
            few_rows_linear(x[:3], layer.values, scales=layer.scales, **wrong)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows(name):
    """As of a video model's image embedding where there is no image."""
    layer = QuantLinear.of(linear(), format=format_of(name))
    for shape in ((2, 0), (0, 3), (0,)):
        assert layer(torch.empty(*shape, 192, dtype=torch.bfloat16)).shape == (*shape, 80)


def test_a_weight_at_any_address():
    """torch's kernel for the CPU ends the process at an address that is no multiple of 16, from four rows on."""
    layer = QuantLinear.of(linear(), format=format_of("int8_weights"))
    x, moved = torch.randn(4, 192), copy.deepcopy(layer)
    moved.values = torch.empty(layer.values.numel() + 1, dtype=torch.int8)[1:].view_as(layer.values)
    moved.values.copy_(layer.values)
    assert error(moved(x)[None], layer(x)[None]) < 0.008


# The interpreter's cast to e4m3 makes a number of NaN.
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in FORMATS for value in (nan, inf, -inf) if (name, value) != ("fp8", nan)],
)
def test_what_is_no_number_stays_none(name, value):
    """As a linear in 16 bit has it: who looks for it finds it, and the other samples are as they were."""
    layer, x = QuantLinear.of(linear(), format=format_of(name)), torch.randn(2, 5, 192)
    spoilt = x.clone()
    spoilt[1, 3, 7] = value
    out = layer(spoilt)
    assert not out[1, 3].isfinite().any()
    torch.testing.assert_close(out[0], layer(x)[0])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_its_type(name, dtype):
    layer = QuantLinear.of(linear(dtype=dtype), format=format_of(name))
    assert layer(torch.randn(3, 192, dtype=dtype)).dtype == dtype
    values = {key: tensor.clone() for key, tensor in layer.packed.items()}
    layer.to(torch.float32)
    assert layer(torch.randn(3, 192)).dtype == torch.float32
    assert all(torch.equal(layer.packed[key], tensor) for key, tensor in values.items())


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_does_not_see_its_neighbours(name):
    layer = QuantLinear.of(linear(), format=format_of(name))
    x = torch.randn(2, 16, 192)
    for neighbour in (x[1:], 1e4 * x[1:]):
        together = layer(torch.cat((x[:1], neighbour)))[:1]
        torch.testing.assert_close(together, layer(x[:1]), rtol=1e-6, atol=1e-6)


def test_tensorwise_has_one_scale_a_sample():
    original = linear()
    original.weight.data /= torch.logspace(-2, 1, 80)[:, None]
    layer = QuantLinear.of(original, format=format_of("fp8"), how="tensorwise")
    assert len(layer.scales.unique()) == 1
    assert layer.takes is None
    x = torch.randn(2, 16, 192)
    assert error(layer(x), original(x)) < ALLOWED["fp8"]
    torch.testing.assert_close(layer(torch.cat((x[:1], 1e3 * x[1:])))[:1], layer(x[:1]))
    assert layer(x[0]).shape == (16, 80)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_takes_what_a_kernel_in_front_made(name):
    original, x = linear(), torch.randn(2, 7, 192)
    out = QuantLinear.of(original, format=format_of(name))(quant_rows(x, quantize=name))
    assert (out.shape, out.dtype) == ((2, 7, 80), torch.float32)
    assert error(out, original(x)) < ALLOWED[name]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_constant_and_zero_rows(name):
    original = linear()
    layer = QuantLinear.of(original, format=format_of(name))
    for value in (0.0, 1.0, -3.0):
        x = torch.full((1, 4, 192), value)
        allowed = 0.03 * abs(value) * original.weight.abs().sum(1) + 1e-6
        for out in (layer(x), layer(quant_rows(x, quantize=name))):
            assert ((out - original(x)).abs() <= allowed).all()


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_hold_the_weight(name):
    layer = QuantLinear.of(linear(), format=format_of(name))
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], layer.dequantised())
    other = QuantLinear.of(linear(), format=format_of(name))
    other.load_state_dict({"weight": -state["weight"], "bias": -state["bias"]})
    x = torch.randn(1, 5, 192)
    torch.testing.assert_close(other(x), -layer(x), rtol=0.02, atol=0.05 * layer(x).abs().max().item())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_checkpoint_that_does_not_fit():
    layer = QuantLinear.of(linear(), format=format_of("int8"))
    before, (outputs, inputs) = layer.dequantised(), layer.dequantised().shape
    for weight in (torch.ones(1, inputs), torch.ones(outputs, inputs + 1)):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict({"weight": weight, "bias": layer.bias})
    with pytest.raises(RuntimeError, match=r"Missing key.*\"weight\""):
        layer.load_state_dict({"bias": layer.bias})
    assert torch.equal(layer.dequantised(), before)


@pytest.mark.parametrize("name", FORMATS)
def test_stacked(name):
    parts = [QuantLinear.of(linear(outputs=n), format=format_of(name)) for n in (32, 48)]
    x, undo = torch.randn(2, 5, 192), ExitStack()
    apart = torch.cat([part(x) for part in parts], -1)
    whole = stacked(parts, torch.cat([part.bias for part in parts]), undo=undo)
    torch.testing.assert_close(whole(x), apart, rtol=1e-5, atol=1e-4)
    assert parts[1].packed["values"].untyped_storage().data_ptr() == whole.packed["values"].untyped_storage().data_ptr()
    undo.close()
    assert parts[1].packed["values"].untyped_storage().nbytes() == parts[1].packed["values"].nbytes
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), apart)


def test_a_layer_is_made_of_shapes_alone():
    """Where blocks are streamed, the scales lie on the device and the values on the host."""
    layer = QuantLinear.of(torch.nn.Linear(48, 32), format=format_of("int8"))
    parts = {name: part if name == "values" else part.to("meta") for name, part in layer.packed.items()}
    made = QuantLinear(parts, format=layer.format, bias=None, dtype=torch.float32)
    assert (made.in_features, made.out_features) == (48, 32)


def test_a_layer_without_memory_takes_a_weight_that_is_loaded():
    linear = torch.nn.Linear(48, 32)
    layer = QuantLinear.of(torch.nn.Linear(48, 32, device="meta"), format=format_of("int8"))
    layer.bias = None
    layer.load_state_dict({"weight": linear.weight})
    assert not any(part.is_meta for part in layer.packed.values())
    torch.testing.assert_close(layer.dequantised().cpu(), linear.weight, rtol=0, atol=2e-3)


def test_takes():
    layers = {name: QuantLinear.of(linear(), format=format_of(name)) for name in FORMATS}
    assert {name: layer.takes for name, layer in layers.items()} == {
        "fp8": "fp8", "int8": None, "fp8_weights": None, "int8_weights": None, "int4_weights": None
    }  # fmt: skip
    cuda = torch.device("cuda")
    assert {name: format_of(name).takes(cuda) for name in ("fp8", "int8")} == {"fp8": "fp8", "int8": "int8"}
