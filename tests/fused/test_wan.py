"""The fused Wan blocks compute what the stock transformers compute, in torch operations and in kernels."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from vivace import InputError
from vivace.attention.native import NATIVE
from vivace.families import wan, wan_vace
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.wan import WAN
from vivace.fused.wan_vace import WAN_VACE

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DENSE = {"in_channels": 48, "out_channels": 48}  # the autoencoder of the model with a time for every position


def transformer(*, kept=True, dtype=torch.float32, **fields):
    """A random transformer; with `kept`, what the class keeps in fp32 stays so in any `dtype`."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**wan.TINY, "num_layers": 3, **fields}).eval()
    return drawn(model, kept=kept, dtype=dtype)


def vace(*, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    return drawn(WanVACETransformer3DModel(**{**wan_vace.TINY, **fields}).eval(), kept=True, dtype=dtype)


def drawn(model, *, kept, dtype):
    apart = model._keep_in_fp32_modules if kept and dtype is not torch.float64 else ()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15)
        parameter.data = parameter.data.to(torch.float32 if not {*apart}.isdisjoint(name.split(".")) else dtype)
    # A cast of the whole takes the rotary tables along.
    return (model if kept else model.to(dtype)).requires_grad_(False)


def inputs(model, *, size=(32, 48), text_tokens=7, **extra):
    given = wan.inputs(model, size=size, batch=2, frames=5, text_tokens=text_tokens)
    times = 1000 * torch.rand(given["timestep"].shape, generator=torch.Generator().manual_seed(3))
    return given | {"timestep": times} | extra


def both(model, arguments, *, form=TORCH, fused=WAN):
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return fused.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@FORMS
@pytest.mark.parametrize(
    ("fields", "size", "text_tokens"),
    [
        ({}, (32, 48), 7),
        (DENSE, (64, 64), 7),
        ({"image_dim": 32, "added_kv_proj_dim": 32, "in_channels": 36}, (32, 32), 512),
    ],
    ids=["text", "a time for every position", "a picture"],
)
def test_equals_stock(form, fields, size, text_tokens):
    model = transformer(**fields)
    fused, stock = both(model, inputs(model, size=size, text_tokens=text_tokens), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize("tokens", [7, 300])
def test_a_picture_is_what_stock_takes_for_one(tokens):
    """512 tokens of text are expected; with fewer, stock counts some of them to the picture."""
    model = transformer(image_dim=32, added_kv_proj_dim=32)
    fused, stock = both(model, inputs(model, text_tokens=tokens))
    torch.testing.assert_close(fused, stock, **CLOSE)


@FORMS
@pytest.mark.parametrize("scales", [None, torch.tensor([0.5, 2.0])])
def test_hints(form, scales):
    model = vace()
    given = wan_vace.inputs(model, size=(32, 48), batch=2, frames=5, text_tokens=7)
    fused, stock = both(model, given | {"control_hidden_states_scale": scales}, form=form, fused=WAN_VACE)
    torch.testing.assert_close(fused, stock, **CLOSE)


def test_a_scale_for_every_control_layer():
    model = vace()
    given = wan_vace.inputs(model, size=(32, 48), batch=2, frames=5, text_tokens=7)
    with ExitStack() as undo, torch.no_grad():
        fused = WAN_VACE.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=TORCH)
        with pytest.raises(InputError, match="2 control layers, got 3 scales"):
            fused(**given, control_hidden_states_scale=torch.ones(3))


# Triton's interpreter cuts what it stores in bf16 off, instead of rounding it.
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(TORCH, torch.bfloat16), (TORCH, torch.float16), (KERNELS, torch.float16)],
    ids=["torch-bf16", "torch-fp16", "kernels-fp16"],
)
@pytest.mark.parametrize("kept", [True, False], ids=["some weights fp32", "all of one type"])
@pytest.mark.parametrize("fields", [{}, DENSE], ids=["one time", "a time for every position"])
def test_is_as_near_to_fp64_as_stock(form, dtype, kept, fields):
    size = (64, 64) if fields else (32, 32)
    model = transformer(kept=kept, dtype=dtype, **fields)
    arguments = inputs(model, size=size)
    wide = transformer(dtype=torch.float64, **fields)
    wide.load_state_dict(model.state_dict())
    exact = wide(**{k: v.double() if torch.is_tensor(v) and k != "timestep" else v for k, v in arguments.items()})[0]
    fused, stock = both(model, arguments, form=form)
    assert fused.dtype == stock.dtype
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


def test_changed_streams_are_normalised_again():
    """What a cache does between blocks: streams are replaced, blocks are left out."""
    model = transformer()
    arguments = inputs(model)

    def doubled(split, kept):
        def forward(state, block):
            state = block.forward(state)
            return replace(state, x=state.x * 2) if block is split.blocks[0] else state

        blocks = tuple(replace(b, forward=lambda state, b=b: forward(state, b)) for b in split.blocks)
        return replace(split, blocks=tuple(blocks[i] for i in kept))

    with ExitStack() as undo, torch.no_grad():
        fused = WAN.fuse(model, attend=NATIVE.attend, undo=undo)
        for kept in ([0, 1, 2], [1, 2], [0, 2], [2, 0]):
            ours, theirs = (doubled(split, kept)(**arguments)[0] for split in (fused, wan.split(model)))
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_what_holds_for_a_prompt_is_computed_once_for_each():
    model = transformer()
    arguments, calls = inputs(model), []
    model.blocks[1].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    with ExitStack() as undo, torch.no_grad():
        fused = WAN.fuse(model, attend=NATIVE.attend, undo=undo)
        once = fused.once(**{name: arguments[name] for name in fused.once_inputs})
        for _ in range(3):
            torch.testing.assert_close(fused(**arguments, once=once)[0], model(**arguments)[0], **CLOSE)
    assert len(calls) == 1 + 3  # stock's


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert WAN.check(model) is None
    model.set_attention_backend("native")
    assert "attention backend" in WAN.check(model)
    model.reset_attention_backend()
    model.blocks[1].attn1.fuse_projections()
    assert "projections fused" in WAN.check(model)
    model.blocks[0].attn2.processor = object()
    assert WAN.check(model) == "blocks.0 has a object"
    assert "no norm" in WAN.check(transformer(cross_attn_norm=False))
    assert WAN.declines(attention_kwargs={"scale": 1.0}) is None
    assert WAN.declines(attention_kwargs={"masks": []}) == "the call brings masks"
