"""The fused Qwen-Image blocks compute what the stock transformer computes, in torch operations and in kernels."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from vivace.attention.native import NATIVE
from vivace.families import qwen_image
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.qwen_image import QWEN_IMAGE

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
WORDS = {
    "all": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "equal": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]],
    "one shorter": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "scattered": [[1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1]],
    "none": [[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]],
}


def transformer(*, dtype=torch.float32, **fields) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**{**qwen_image.TINY, "num_layers": 3} | fields).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).requires_grad_(False)


def inputs(model, *, size=(32, 48), batch=2, **extra) -> dict:
    return qwen_image.inputs(model, size=size, batch=batch, text_tokens=7) | extra


def both(model, arguments, *, form=TORCH, attend=NATIVE.attend) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return QWEN_IMAGE.fuse(model, attend=attend, undo=undo, elementwise=form)(**arguments)[0], stock


@FORMS
def test_equals_stock(form):
    model = transformer()
    fused, stock = both(model, inputs(model), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize("words", WORDS)
def test_padded_prompts(words):
    """Prompts that end in padding are attended to without a mask; only holes between words need one."""
    masks = []

    def attend(q, k, v, *, mask=None, scale=None):
        masks.append(mask)
        return NATIVE.attend(q, k, v, mask=mask, scale=scale)

    model = transformer()
    mask = {"encoder_hidden_states_mask": torch.tensor(WORDS[words])}
    fused, stock = both(model, inputs(model, **mask), attend=attend)
    torch.testing.assert_close(fused, stock, **CLOSE)
    assert all((one is not None) == (words in ("scattered", "none")) for one in masks)
    assert len(masks) == 3 * (2 if words == "one shorter" else 1)


@FORMS
@pytest.mark.parametrize("still", [False, True], ids=["", "2511"])
def test_pictures_to_edit(form, still):
    """Also where they are modulated apart from the new one, by tokens that are no multiple of each other."""
    model = transformer(zero_cond_t=still)
    edit = {"hidden_states": torch.randn(2, 6 + 6 + 4, 64), "img_shapes": [[(1, 3, 2), (1, 2, 3), (1, 2, 2)]] * 2}
    fused, stock = both(model, inputs(model, **edit), form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize(
    ("still", "shapes"), [(True, [[(1, 2, 3)]] * 2), (False, [(1, 2, 3)] * 2)], ids=["2511", "as ControlNets say it"]
)
def test_nothing_to_edit(still, shapes):
    model = transformer(zero_cond_t=still)
    fused, stock = both(model, inputs(model, img_shapes=shapes))
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_control_residuals(count):
    model = transformer()
    control = {"controlnet_block_samples": [torch.randn(2, 6, 32) for _ in range(count)]}
    fused, stock = both(model, inputs(model, **control))
    torch.testing.assert_close(fused, stock, **CLOSE)


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
    for block in model.transformer_blocks:
        block.img_mlp.net[2].weight.mul_(3000)
    fused, stock = both(model, inputs(model))
    assert fused.isfinite().all()
    assert stock.isfinite().all()


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert QWEN_IMAGE.check(model) is None
    model.transformer_blocks[1].attn.processor = object()
    assert QWEN_IMAGE.check(model) == "transformer_blocks.1 has a object"
    own = QwenDoubleStreamAttnProcessor2_0()
    own._attention_backend = "flash"
    model.transformer_blocks[1].attn.processor = own
    assert "attention backend" in QWEN_IMAGE.check(model)
    assert QWEN_IMAGE.declines(attention_kwargs={"scale": 1.0}) is None
    assert "guidance" in QWEN_IMAGE.declines(guidance=torch.ones(1))
    assert QWEN_IMAGE.declines(img_shapes=[[(1, 2, 3)]] * 2) is None
    assert "several sizes" in QWEN_IMAGE.declines(img_shapes=[[(1, 2, 3)], [(1, 3, 2)]])
