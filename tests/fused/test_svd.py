"""The fused video UNet computes what the stock one computes, in torch operations and in kernels, in both orders."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import AttnProcessor

from vivace.attention.native import NATIVE
from vivace.families import svd
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.svd import SVD

ORDERS = pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
# Every kind of block once.
SMALL = {
    **svd.TINY,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "block_out_channels": (32, 64),
    "num_attention_heads": (2, 4),
}


def unet(config=SMALL, *, last=False, **fields) -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(**{**config, **fields}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
    for module in model.modules() if last else ():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model.requires_grad_(False)


def inputs(model, *, size=(32, 32), batch=2, frames=3, **extra) -> dict:
    return svd.inputs(model, size=size, batch=batch, frames=frames) | extra


def both(model, arguments, *, form=TORCH) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return SVD.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@ORDERS
@pytest.mark.parametrize(
    ("config", "size", "batch", "frames"),
    [(svd.TINY, (64, 64), 2, 3), (SMALL, (40, 24), 1, 5), (SMALL, (32, 32), 2, 1)],
    ids=["tiny", "odd", "one frame"],
)
def test_equals_stock(last, config, size, batch, frames):
    model = unet(config, last=last)
    fused, stock = both(model, inputs(model, size=size, batch=batch, frames=frames))
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.full  # 32 groups a norm are 32 programs, and the interpreter is slow
def test_kernels_equal_stock():
    one = {name: SMALL[name][:1] for name in ("down_block_types", "block_out_channels", "num_attention_heads")}
    model = unet(last=True, **one, up_block_types=SMALL["up_block_types"][1:])
    fused, stock = both(model, inputs(model, size=(16, 8), batch=1, frames=2), form=KERNELS)
    torch.testing.assert_close(fused, stock, **CLOSE)


def test_several_layers_in_a_block():
    model = unet(transformer_layers_per_block=2, layers_per_block=2)
    fused, stock = both(model, inputs(model))
    torch.testing.assert_close(fused, stock, **CLOSE)


def test_layers_of_other_kinds_are_called():
    """A linear with something beside it (a quantised weight) is called, never read."""
    doubling = type("Doubling", (torch.nn.Linear,), {"forward": lambda self, x: 2 * torch.nn.Linear.forward(self, x)})
    model = unet()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not name.endswith(("time_emb_proj", "attn1.to_q", "1.to_k", "1.to_v")):
            module.__class__ = doubling
    fused, stock = both(model, inputs(model))
    assert (fused - stock).norm() < 1e-3 * stock.norm()


@ORDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_as_near_to_fp64_as_stock(last, dtype):
    model = unet(last=last)
    arguments = inputs(model)

    def cast(dtype):
        return {k: v.to(dtype) if torch.is_tensor(v) and k != "timestep" else v for k, v in arguments.items()}

    with torch.no_grad():
        exact = model.double()(**cast(torch.float64))[0]
    fused, stock = both(model.to(dtype), cast(dtype))
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


def test_says_what_it_cannot_fuse():
    model = unet()
    assert SVD.check(model) is None
    model.enable_forward_chunking(1)
    assert "feed-forward in chunks" in SVD.check(model)
    model = unet()
    model.set_attn_processor(AttnProcessor())
    assert "a AttnProcessor" in SVD.check(model)
    assert SVD.declines(**inputs(model)) is None
    assert "4 tokens" in SVD.declines(encoder_hidden_states=torch.zeros(1, 4, 32))
