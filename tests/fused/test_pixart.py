"""The fused PixArt blocks compute what the stock transformer computes, in torch operations and in kernels."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from vivace import InputError
from vivace.attention.native import NATIVE
from vivace.families import pixart
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.pixart import PIXART

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MASKS = {
    "no mask": None,
    "all": [[1] * 7] * 3,
    "as many": [[1] * 4 + [0] * 3] * 3,
    "some": [[1] * 2 + [0] * 5, [1] * 6 + [0], [1] * 6 + [0]],
    "gaps": [[0, 1, 0, 1, 0, 0, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]],
    "nothing": [[0] * 7, [1] * 3 + [0] * 4, [0] * 7],
}


def transformer(*, dtype=torch.float32, **fields) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**{**pixart.TINY, "num_layers": 3, **fields}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).requires_grad_(False)


def inputs(model, *, size=(32, 48), mask=None, **extra) -> dict:
    given = pixart.inputs(model, size=size, batch=3, text_tokens=7)
    return given | {"encoder_attention_mask": None if mask is None else torch.tensor(mask)} | extra


def both(model, arguments, *, form=TORCH) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return PIXART.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@FORMS
@pytest.mark.parametrize("kind", ["sigma", "alpha", "text as it comes"])
def test_equals_stock(form, kind):
    alpha = {"use_additional_conditions": True, "attention_head_dim": 24, "cross_attention_dim": 48}
    model = transformer(**alpha if kind == "alpha" else {})
    if kind == "text as it comes":
        model.caption_projection = None
    fused, stock = both(model, inputs(model, mask=MASKS["some"]), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_tokens_that_do_not_count_are_left_out(mask):
    model, masks = transformer(), []

    def attend(q, k, v, *, mask=None, scale=None):
        masks.append(mask)
        return NATIVE.attend(q, k, v, mask=mask, scale=scale)

    arguments = inputs(model, mask=mask)
    with ExitStack() as undo, torch.no_grad():
        fused = PIXART.fuse(model, attend=attend, undo=undo, elementwise=TORCH)(**arguments)[0]
        stock = model(**arguments)[0]
    torch.testing.assert_close(fused, stock, **CLOSE)
    assert set(masks) == {None}


def test_the_second_half_of_the_samples_alone():
    """What a cache of guidance asks for, with what was computed for all of them."""
    model = transformer()
    arguments = inputs(model, mask=MASKS["some"])
    with ExitStack() as undo, torch.no_grad():
        fused = PIXART.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=TORCH)
        once = fused.prepare(arguments)
        half = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t[1:] if t.ndim and len(t) == 3 else t, {**arguments, "once": once}
        )
        torch.testing.assert_close(fused(**half)[0], model(**arguments)[0][1:], **CLOSE)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(TORCH, torch.bfloat16), (TORCH, torch.float16), (KERNELS, torch.float16)],
    ids=["torch-bf16", "torch-fp16", "kernels-fp16"],
)
def test_is_as_near_to_fp64_as_stock(form, dtype):
    model = transformer()
    arguments = inputs(model, mask=MASKS["some"])
    exact = model.double()(**{k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()})[0]
    cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    fused, stock = both(model.to(dtype), cast, form=form)
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


def test_size_and_aspect_ratio_are_asked_for():
    model = transformer(use_additional_conditions=True, attention_head_dim=24, cross_attention_dim=48)
    arguments = inputs(model, added_cond_kwargs=None)
    with ExitStack() as undo, torch.no_grad():
        fused = PIXART.fuse(model, attend=NATIVE.attend, undo=undo)
        with pytest.raises(InputError, match="pass added_cond_kwargs"):
            fused(**arguments)


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert PIXART.check(model) is None
    model.transformer_blocks[1].set_chunk_feed_forward(2)
    assert PIXART.check(model) == "block 1 has _chunk_size=2"
    model.transformer_blocks[0].attn2.processor = object()
    assert PIXART.check(model) == "block 0 has a object"
    assert "for its activation" in PIXART.check(transformer(activation_fn="geglu"))
    assert "norm_elementwise_affine=True" in PIXART.check(transformer(norm_elementwise_affine=True))
    assert PIXART.declines(encoder_attention_mask=torch.ones(2, 7), cross_attention_kwargs={"scale": 1.0}) is None
    assert "a bias" in PIXART.declines(encoder_attention_mask=torch.zeros(2, 1, 7))
    assert "attention_mask" in PIXART.declines(attention_mask=torch.ones(2, 7))
