"""The fused FLUX.2 blocks compute what the stock transformer computes, in torch operations and in kernels."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from vivace.attention.native import NATIVE
from vivace.families import flux2
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.flux2 import FLUX2
from vivace.kernels.row import RowScaled
from vivace.quant import format_of
from vivace.quant.linear import QuantLinear

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def transformer(*, dtype=torch.float32, **fields) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**{**flux2.TINY, "num_layers": 2, "num_single_layers": 3} | fields).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).requires_grad_(False)


def inputs(model, *, size=(32, 48), batch=2, **extra) -> dict:
    return flux2.inputs(model, size=size, batch=batch, text_tokens=7) | extra


def both(model, arguments, *, form=TORCH) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return FLUX2.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@FORMS
@pytest.mark.parametrize("guidance", [True, False])
def test_equals_stock(form, guidance):
    model = transformer(guidance_embeds=guidance)
    fused, stock = both(model, inputs(model), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


def test_positions_with_a_batch_dimension_and_the_output_object():
    model = transformer()
    arguments = inputs(model, return_dict=True)
    arguments |= {name: arguments[name][None].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)
        fused = FLUX2.fuse(model, attend=NATIVE.attend, undo=undo)(**arguments)
    assert type(fused) is type(stock)
    torch.testing.assert_close(fused.sample, stock.sample, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_is_as_near_to_fp64_as_stock(dtype, form):
    model = transformer()
    arguments = inputs(model)

    def cast(kind):
        return {k: v.to(kind) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}

    exact = model.double()(**cast(torch.float64))[0]
    fused, stock = both(model.to(dtype), cast(dtype), form=form)
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


def test_a_quantised_output_takes_attention_and_mlp_joined_in_rows(monkeypatch):
    model = transformer()
    arguments = inputs(model, batch=1)
    for block in model.single_transformer_blocks:
        block.attn.to_out = QuantLinear.of(block.attn.to_out, format=format_of("fp8"))
    taken = []
    product = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: (taken.append(x), product(self, x))[1])
    fused, stock = both(model, arguments, form=KERNELS)
    assert [type(x) for x in taken] == 3 * [torch.Tensor] + 3 * [RowScaled]
    torch.testing.assert_close(taken[3].dense(), taken[0], rtol=2**-3, atol=2e-2)
    assert (fused - stock).norm() <= 0.05 * stock.norm()


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert FLUX2.check(model) is None
    model.single_transformer_blocks[1].attn.processor = object()
    assert FLUX2.check(model) == "single_transformer_blocks.1 has a object"
    assert FLUX2.declines(joint_attention_kwargs={"scale": 1.0}) is None
    assert "keys and values" in FLUX2.declines(kv_cache_mode="extract")
