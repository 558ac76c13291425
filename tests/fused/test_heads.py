"""q, k and v written in e4m3 by the pass that normalises them, in every family whose norms bound them."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from vivace.attention.cudnn_fp8 import CUDNN_FP8, CUDNN_FP8_ROTATED
from vivace.attention.guard import NotFiniteError, guarded
from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.fused import fused_of, heads
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.packed_norms import packed_norms
from vivace.kernels.qk_norm_rope import qk_norm_rope_ref
from vivace.kernels.quant_heads import quant_heads, quant_heads_ref
from vivace.kernels.row import RowScaled
from vivace.quant import format_of
from vivace.quant.layers import linears
from vivace.quant.linear import QuantLinear

NORMALISED = ("flux", "flux2", "qwen_image", "sd3", "wan", "wan_vace", "z_image")


@pytest.fixture
def packed(emulated_fp8):
    """fp8 attention at every size that a tiny model has, and what it was handed."""
    seen = []

    def run(operands, *, scale=None):
        seen.append(operands)
        return CUDNN_FP8.attend.heads(operands, scale=scale)

    attend = replace(CUDNN_FP8.attend, serves=lambda *, keys, depth, mask: mask is None, heads=run)
    return attend, seen


def tiny(name):
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(family.tiny(), family.denoisers[0]).eval().requires_grad_(False)
    frames = 5 if "wan" in name else 1
    return model, family.inputs(model, size=(64, 64), batch=2, frames=frames, text_tokens=7)


def forward(name, model, arguments, *, attend, form):
    with ExitStack() as undo, torch.no_grad():
        split = fused_of(FAMILIES[name]).fuse(model, attend=attend, undo=undo, elementwise=form)
        out = split(**arguments)[0]
        return torch.stack(out) if isinstance(out, list) else out


def far(out, exact):
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", NORMALISED)
def test_norms_write_e4m3(name, packed):
    model, arguments = tiny(name)
    exact = forward(name, model, arguments, attend=NATIVE.attend, form=TORCH)
    attend, seen = packed
    out = forward(name, model, arguments, attend=attend, form=TORCH)
    # A scale that neither block knew beforehand comes from the norms alone, and joins q's with k's.
    assert any(operands.descale is not None for operands in seen)
    assert 1e-4 < far(out, exact) < 0.1
    if name == "flux":
        kernels = forward(name, model, arguments, attend=attend, form=KERNELS)
        assert far(kernels, out) < 0.05


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_quantised_projections_read_the_heads(name, packed, monkeypatch):
    """No linear of a block gets 16 bit: attention's output least of all."""
    model, arguments = tiny(name)
    exact = forward(name, model, arguments, attend=NATIVE.attend, form=KERNELS)
    quantised = []
    for layer, linear in list(linears(model)):
        if any(part in layer for part in ("attn", "attention", "proj_mlp", "proj_out", "ff")) and "." in layer:
            model.set_submodule(layer, QuantLinear.of(linear, format=format_of("fp8")))
            quantised.append(layer)
    taken = []
    product = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: (taken.append(x), product(self, x))[1])
    out = forward(name, model, arguments, attend=packed[0], form=KERNELS)
    assert {type(x) for x in taken} == {RowScaled}
    assert far(out, exact) < 0.2


def test_a_sample_does_not_see_its_neighbour(packed):
    model, arguments = tiny("flux")
    together = forward("flux", model, arguments, attend=packed[0], form=TORCH)
    loud = dict(arguments)
    for name in ("hidden_states", "encoder_hidden_states"):
        loud[name] = torch.cat((arguments[name][:1], 100 * arguments[name][1:]))
    torch.testing.assert_close(forward("flux", model, loud, attend=packed[0], form=TORCH)[0], together[0])


def test_the_bound_is_of_the_norm_alone():
    torch.manual_seed(0)
    weights = [(3 * torch.rand(128), 0.01 * torch.rand(128)) for _ in range(2)]
    one, two = packed_norms(weights)
    assert torch.equal(one.descale, two.descale)
    x = torch.randn(1, 1000, 3 * 128) ** 5  # heads with one channel far out
    x[:, 0, 5] = 1e6
    angles = torch.randn(1000, 64)
    largest = []
    for norms, (q_weight, k_weight) in zip((one, two), weights, strict=True):
        q, k, q_exact, k_exact = (torch.empty(1, 1000, 1, 128) for _ in range(4))
        rest = angles.cos(), angles.sin(), 0, 1e-6
        qk_norm_rope_ref(x, q, k, None, None, norms.q_weight, norms.k_weight, *rest)
        qk_norm_rope_ref(x, q_exact, k_exact, None, None, q_weight, k_weight, *rest)
        torch.testing.assert_close((q * k) * norms.descale, q_exact * k_exact)
        largest.append(q.abs().max().item())
    assert 100 < max(largest) <= 448.001


def test_what_has_no_bound_or_is_rotated_stays_in_16_bit(packed):
    model, arguments = tiny("flux")
    attend, seen = packed
    rotated = replace(attend, scales_only=CUDNN_FP8_ROTATED.attend.scales_only)
    forward("flux", model, arguments, attend=rotated, form=TORCH)
    assert seen
    assert all(operands.descale is None for operands in seen)


def test_a_nan_in_v_is_seen(packed, monkeypatch):
    """By the guard, in the output; the interpreter's cast to e4m3 makes a number of it, so torch casts here."""
    monkeypatch.setattr(heads, "quant_heads", lambda v, *, scale: quant_heads_ref(v, None, scale, None)[0])
    model, arguments = tiny("flux")
    model.single_transformer_blocks[1].attn.to_v.bias.data[3] = float("nan")
    attend = guarded(replace(CUDNN_FP8, attend=packed[0]))
    with pytest.raises(NotFiniteError, match="backend cudnn_fp8"):
        forward("flux", model, arguments, attend=attend, form=TORCH)
    assert len(packed[1]) == 4


@pytest.mark.gpu
def test_the_cast_keeps_nan():
    x = torch.ones(1, 4, 2, 16, device="cuda")
    x[0, 1, 0, 3] = float("nan")
    assert torch.equal(quant_heads(x).float().isnan(), x.isnan())


@pytest.mark.parametrize("samples", [3, heads.SEVERAL + 1])
def test_rows_that_lie_apart_are_projected_as_they_are(samples, monkeypatch):
    linear, products, addmm = torch.nn.Linear(24, 16), [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *given, **more: products.append(addmm(*given, **more)))
    y = torch.randn(samples, 10, 24)
    with torch.no_grad():
        torch.testing.assert_close(heads.projected(linear, y[:, 2:7], dtype=y.dtype), linear(y[:, 2:7]))
    # A training's batch would be hundreds of small products.
    assert len(products) == (samples if samples <= heads.SEVERAL else 0)
