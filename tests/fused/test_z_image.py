"""The fused Z-Image blocks compute what the stock transformer computes, in torch operations and in kernels."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from vivace.attention.native import NATIVE
from vivace.families import z_image
from vivace.families.tiny import without_zeros
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.z_image import Z_IMAGE

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def transformer(*, dtype=torch.float32, **fields) -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = without_zeros(ZImageTransformer2DModel(**{**z_image.TINY, "n_layers": 3, "n_refiner_layers": 2} | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(dtype).requires_grad_(False)


def inputs(model, *, size=(64, 128), batch=2, words=(7, 7), **extra) -> dict:
    """Of a size whose tokens need no padding; `words` of each sample."""
    arguments = z_image.inputs(model, size=size, batch=batch, text_tokens=max(words))
    captions = [caption[:count] for caption, count in zip(arguments["cap_feats"], words, strict=True)]
    return arguments | {"cap_feats": captions} | extra


def both(model, arguments, *, form=TORCH, attend=NATIVE.attend) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        fused = Z_IMAGE.fuse(model, attend=attend, undo=undo, elementwise=form)(**arguments)[0]
        assert type(fused) is type(stock)
        return list(zip(fused, stock, strict=True))


def check_pairs(pairs) -> None:
    for fused, stock in pairs:
        torch.testing.assert_close(fused, stock, **CLOSE)


@FORMS
@pytest.mark.parametrize("size", [(64, 128), (48, 80)], ids=["whole", "padded"])
def test_equals_stock(form, size):
    model = transformer()
    check_pairs(both(model, inputs(model, size=size), form=form))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        *((TORCH, words) for words in [(5, 20), (40, 7), (32, 64)]),
        (KERNELS, (40, 7)),
        *(pytest.param(KERNELS, words, marks=pytest.mark.full) for words in [(5, 20), (32, 64)]),
    ],
)
def test_captions_of_several_lengths(form, words):
    """Each sample attends to its own tokens; no attention call has a mask."""
    lengths = []

    def attend(q, k, v, *, mask=None, scale=None):
        assert mask is None
        lengths.append(k.shape[1])
        return NATIVE.attend(q, k, v, scale=scale)

    model = transformer()
    check_pairs(both(model, inputs(model, words=words), form=form, attend=attend))
    assert {length - 32 for length in lengths} >= {-(-count // 32) * 32 for count in words}


def test_control_residuals_of_some_layers():
    model = transformer()
    kwargs = inputs(model, words=(7, 40))
    with torch.no_grad():
        joint = z_image.split(model).prologue(**kwargs).x
    check_pairs(both(model, kwargs | {"controlnet_block_samples": {1: torch.randn_like(joint)}}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_is_as_near_to_fp64_as_stock(dtype, form):
    model = transformer()
    arguments = inputs(model)

    def cast(kind):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(kind), arguments)

    exact = torch.stack(model.double()(**cast(torch.float64))[0])
    pairs = zip(*both(model.to(dtype), cast(dtype), form=form), strict=True)
    fused, stock = (torch.stack(samples).double() for samples in pairs)
    assert (fused - exact).norm() <= 1.2 * (stock - exact).norm()


def test_changed_streams_are_normalised_again():
    """What a cache does between blocks: streams are replaced, blocks are left out."""
    model = transformer()
    arguments = inputs(model)

    def doubled(split):
        def forward(state, block):
            return replace(block.forward(state), x=block.forward(state).x * 2)

        blocks = (replace(b, forward=lambda state, b=b: forward(state, b)) for b in split.blocks)
        return replace(split, blocks=tuple(blocks))

    with ExitStack() as undo, torch.no_grad():
        splits = Z_IMAGE.fuse(model, attend=NATIVE.attend, undo=undo), z_image.split(model)
        check_pairs(zip(*(doubled(split)(**arguments)[0] for split in splits), strict=True))
        check_pairs(zip(*(replace(s, blocks=(s.blocks[0], s.blocks[2]))(**arguments)[0] for s in splits), strict=True))


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert Z_IMAGE.check(model) is None
    model.noise_refiner[1].attention.processor = object()
    assert Z_IMAGE.check(model) == "noise_refiner.1 has a object"
    pictures = [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 12)]
    assert "differ in size" in Z_IMAGE.declines(x=pictures)
    assert "several pictures" in Z_IMAGE.declines(x=[pictures])
    assert Z_IMAGE.declines(x=pictures[:1], joint_attention_kwargs={"scale": 1.0}) is None
