"""The fused FLUX blocks compute what the stock transformer computes, in torch operations and in kernels."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from vivace import InputError
from vivace.attention.native import NATIVE
from vivace.families import flux
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.flux import FLUX
from vivace.kernels.row import RowScaled
from vivace.quant import format_of
from vivace.quant.linear import QuantLinear

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def transformer(*, dtype=torch.float32, **fields) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = {**flux.TINY, "num_layers": 3, "num_single_layers": 3, "axes_dims_rope": (4, 6, 6)}
    model = FluxTransformer2DModel(**config | fields).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).requires_grad_(False)


def inputs(model, *, size=(32, 48), batch=2, **extra) -> dict:
    return flux.inputs(model, size=size, batch=batch, text_tokens=7) | extra


def both(model, arguments, *, form=TORCH) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return FLUX.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@FORMS
@pytest.mark.parametrize("fields", [{"guidance_embeds": False}, {"num_layers": 1, "num_single_layers": 1}])
def test_equals_stock(form, fields):
    model = transformer(**fields)
    fused, stock = both(model, inputs(model), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize(
    ("form", "double", "single"),
    [(TORCH, 3, 3), (TORCH, 2, 0), (TORCH, 0, 2), (KERNELS, 2, 1)],
    ids=["all", "double", "single", "kernels"],
)
def test_control_residuals(form, double, single):
    model = transformer()
    several = lambda count: [torch.randn(2, 6, 32) for _ in range(count)] or None  # noqa: E731
    for repeat in (False, True) if form is TORCH else (False,):
        control = {
            "controlnet_block_samples": several(double),
            "controlnet_single_block_samples": several(single),
            "controlnet_blocks_repeat": repeat,
        }
        fused, stock = both(model, inputs(model, **control), form=form)
        torch.testing.assert_close(fused, stock, **CLOSE)


@FORMS
def test_layers_of_other_kinds_are_called(form):
    """A linear with something beside it (an adapter, a quantised weight) is called, never read."""

    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = transformer()
    for name, module in list(model.named_modules()):
        if name.endswith((".proj_out", "proj_mlp", "to_out.0", "to_add_out", "net.2", "0.proj", "x_embedder")):
            module.__class__ = Doubling
    fused, stock = both(model, inputs(model), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


def test_a_quantised_output_takes_attention_and_mlp_joined_in_rows(monkeypatch):
    model = transformer()
    arguments = inputs(model, batch=1)
    exact = model(**arguments)[0]
    projections = [block.proj_out for block in model.single_transformer_blocks]
    for block, linear in zip(model.single_transformer_blocks, projections, strict=True):
        block.proj_out = QuantLinear.of(linear, format=format_of("fp8"))
    taken = []
    product = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: (taken.append(x), product(self, x))[1])
    stock = model(**arguments)[0]
    assert [type(x) for x in taken] == 3 * [torch.Tensor]
    dense = taken[0]
    taken.clear()
    fused, _ = both(model, arguments, form=KERNELS)
    assert [type(x) for x in taken[3:]] == 3 * [RowScaled]
    # Rounding to 8 bits is all that lies between the rows that a kernel joins and those that torch concatenates.
    torch.testing.assert_close(taken[3].dense(), dense, rtol=2**-3, atol=1e-3)
    assert (fused - exact).norm() <= 1.5 * (stock - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_is_as_near_to_fp64_as_stock(dtype, form):
    model = transformer()
    arguments = inputs(model)
    exact = model.double()(**{k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()})[0]
    cast = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in arguments.items()}
    fused, stock = both(model.to(dtype), cast, form=form)
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


def test_float16_saturates_as_stock():
    model = transformer(dtype=torch.float16)
    for block in model.single_transformer_blocks:
        block.proj_out.weight.mul_(3000)
    fused, stock = both(model, inputs(model))
    assert fused.isfinite().all()
    assert stock.isfinite().all()


def test_changed_streams_are_normalised_again():
    """What a cache does between blocks: streams are replaced, blocks are left out."""
    model = transformer()
    arguments = inputs(model)

    def doubled(split):
        def forward(state, block):
            state = block.forward(state)
            return replace(state, x=state.x * 2)

        return replace(
            split, blocks=tuple(replace(b, forward=lambda state, b=b: forward(state, b)) for b in split.blocks)
        )

    with ExitStack() as undo, torch.no_grad():
        fused = doubled(FLUX.fuse(model, attend=NATIVE.attend, undo=undo))(**arguments)[0]
        stock = doubled(flux.split(model))(**arguments)[0]
        torch.testing.assert_close(fused, stock, **CLOSE)
        for kept in ([0, 2, 3, 5], [0, 1, 2, 3, 5], [1, 4]):
            few = [
                replace(split, blocks=tuple(split.blocks[i] for i in kept))(**arguments)[0]
                for split in (FLUX.fuse(model, attend=NATIVE.attend, undo=undo), flux.split(model))
            ]
            torch.testing.assert_close(*few, **CLOSE)


def test_positions_with_a_batch_dimension_and_the_output_object():
    model = transformer()
    arguments = inputs(model, return_dict=True)
    arguments |= {name: arguments[name][None].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)
        fused = FLUX.fuse(model, attend=NATIVE.attend, undo=undo)(**arguments)
    assert type(fused) is type(stock)
    torch.testing.assert_close(fused.sample, stock.sample, **CLOSE)


def test_guidance_that_does_not_fit_is_an_error():
    for embeds in (True, False):
        model = transformer(guidance_embeds=embeds)
        wrong = inputs(model, guidance=None if embeds else torch.ones(2))
        with ExitStack() as undo, pytest.raises(InputError, match="guidance"), torch.no_grad():
            FLUX.fuse(model, attend=NATIVE.attend, undo=undo)(**wrong)


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert FLUX.check(model) is None
    model.set_attention_backend("native")
    assert "attention backend" in FLUX.check(model)
    model.reset_attention_backend()
    model.transformer_blocks[1].attn.processor = object()
    assert FLUX.check(model) == "transformer_blocks.1 has a object"
    assert FLUX.declines(joint_attention_kwargs={"scale": 1.0}) is None
    assert "ip_adapter_image_embeds" in FLUX.declines(joint_attention_kwargs={"ip_adapter_image_embeds": []})
