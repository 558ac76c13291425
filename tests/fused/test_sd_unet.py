"""The fused UNet computes what the stock one computes, in torch operations and in kernels, in both orders of pixels."""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from vivace.attention.native import NATIVE
from vivace.families import sd, sdxl
from vivace.families.unet import inputs, split
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.sd_unet import SD_UNET

FORMS = pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
ORDERS = pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Every kind of block once: the interpreter is slow.
SMALL = {
    **sd.TINY,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 24),
    "norm_num_groups": 2,
    "layers_per_block": 1,
}


def unet(config=SMALL, *, order=torch.contiguous_format, **fields) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**{**config, **fields}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(memory_format=order).requires_grad_(False)


def small(model, size=(32, 32), **extra) -> dict:
    return inputs(model, size=size, batch=2, text_tokens=7) | extra


def both(model, arguments, *, form=TORCH) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return SD_UNET.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@ORDERS
@pytest.mark.parametrize("config", [sd.TINY, sdxl.TINY], ids=["sd", "sdxl"])
@pytest.mark.parametrize("size", [(64, 64), (72, 40)], ids=["even", "odd"])
def test_equals_stock(order, config, size):
    model = unet(config, order=order)
    fused, stock = both(model, small(model, size))
    torch.testing.assert_close(fused, stock, **CLOSE)


@ORDERS
def test_kernels_equal_stock(order):
    model = unet(order=order)
    fused, stock = both(model, small(model, (24, 16)), form=KERNELS)
    torch.testing.assert_close(fused, stock, **CLOSE)


def test_kernels_equal_stock_in_deeper_transformers():
    fields = {"use_linear_projection": True, "transformer_layers_per_block": 2}
    model = unet(order=torch.channels_last, **fields)
    fused, stock = both(model, small(model, (16, 8)), form=KERNELS)
    torch.testing.assert_close(fused, stock, **CLOSE)


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.counts[function.name().split("::")[1].split(".")[0]] += 1
        return function(*arguments, **(named or {}))


def test_sums_skips_and_biases_take_no_launches_of_their_own():
    model = unet(order=torch.channels_last)
    with ExitStack() as undo, torch.no_grad():
        fused = SD_UNET.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=KERNELS)
        with Operations() as operations:
            fused(**small(model, (16, 8)))
    counts, transformers = operations.counts, 4  # one down, one in the middle, two up
    assert counts["residual_norm"] == counts["addmm_"] == 2 * transformers
    # Residual blocks that no transformer follows: one down, the last in the middle, two up.
    assert counts["gate_residual"] == 4
    assert counts["cat"] == 2  # both of the embedding of the step


@ORDERS
def test_control_and_adapter_residuals(order):
    model, form = unet(sd.TINY, order=order), TORCH
    arguments = small(model, (64, 64))
    with torch.no_grad():
        state = split(model).prologue(**arguments)
        for block in split(model).blocks[:4]:
            state = block.forward(state)
    control = {
        "down_block_additional_residuals": tuple(torch.randn(skip.shape) for skip in state.skips),
        "mid_block_additional_residual": torch.randn(state.x.shape),
    }
    fused, stock = both(model, arguments | control, form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)
    shapes = [(16, 8), (16, 4), (32, 2), (32, 1), (32, 1)]
    for count in (4, 5):
        given = [torch.randn(2, channels, side, side) for channels, side in shapes[:count]]
        with ExitStack() as undo, torch.no_grad():
            stock = model(**arguments, down_intrablock_additional_residuals=list(given))[0]
            fused = SD_UNET.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)
            ours = fused(**arguments, down_intrablock_additional_residuals=list(given))[0]
        torch.testing.assert_close(ours, stock, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"mid_block_type": None}, {}),
        ({"mid_block_type": "UNetMidBlock2D"}, {}),
        ({"use_linear_projection": True, "layers_per_block": 2}, {"timestep": 3.5}),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 4])}),
        ({"time_cond_proj_dim": 8}, {"timestep_cond": torch.ones(2, 8)}),
        ({"norm_num_groups": None}, {}),
        ({"act_fn": "silu", "center_input_sample": True}, {"cross_attention_kwargs": {"scale": 0.5}}),
    ],
    ids=str,
)
def test_every_kind_that_is_fused(fields, extra):
    if fields.get("norm_num_groups", 1) is None:
        fields = {
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "mid_block_type": None,
        }
        fields |= {"block_out_channels": (16, 32)}
    model = unet(**fields)
    assert SD_UNET.check(model) is None
    assert SD_UNET.declines(**small(model, **extra)) is None
    fused, stock = both(model, small(model, **extra))
    torch.testing.assert_close(fused, stock, **CLOSE)


@ORDERS
@pytest.mark.parametrize("linear", [False, True])
def test_layers_of_other_kinds_are_called(order, linear):
    """A layer with something beside it (an adapter, a quantised weight) is called, never read."""

    def doubled(kind):
        return type("Doubling", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})

    model = unet(order=order, use_linear_projection=linear)
    kinds = {kind: doubled(kind) for kind in (torch.nn.Conv2d, torch.nn.Linear)}
    for name, module in list(model.named_modules()):
        if type(module) in kinds and not name.endswith(("time_emb_proj", "to_q", "to_k", "to_v")):
            module.__class__ = kinds[type(module)]
    for form in (TORCH, KERNELS) if order is torch.channels_last and not linear else (TORCH,):
        fused, stock = both(model, small(model, (16, 8)), form=form)
        torch.testing.assert_close(fused, stock, **CLOSE)


def test_freeu():
    # FreeU is for skips of 640 and 1280 channels.
    model = unet(block_out_channels=(640, 1280), mid_block_type=None)
    arguments = small(model, (16, 16))
    plain, _ = both(model, arguments)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    fused, stock = both(model, arguments)
    torch.testing.assert_close(fused, stock, **CLOSE)
    assert not torch.allclose(fused, plain, **CLOSE)


@ORDERS
@FORMS
def test_is_as_near_to_fp64_as_stock(order, form):
    model = unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    model = model.to(memory_format=order)
    arguments = small(model, (16, 16))

    def cast(dtype):
        wide = {"sample": arguments["sample"], "encoder_hidden_states": arguments["encoder_hidden_states"]}
        added = {name: tensor.to(dtype) for name, tensor in arguments["added_cond_kwargs"].items()}
        return arguments | {name: tensor.to(dtype) for name, tensor in wide.items()} | {"added_cond_kwargs": added}

    with torch.no_grad():
        exact = model.double()(**cast(torch.float64))[0]
    fused, stock = both(model.to(torch.bfloat16), cast(torch.bfloat16), form=form)
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "time_embedding_norm='scale_shift'"),
        ({"act_fn": "mish"}, "a Mish for its activation"),
        ({"dual_cross_attention": True}, "holds a DualTransformer2DModel"),
        ({"only_cross_attention": True}, "only_cross_attention=True"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "goes through a Linear"),
        ({"cross_attention_dim": (32, 16)}, "texts of different widths"),
        ({"down_block_types": ("ResnetDownsampleBlock2D",) * 2}, "is a ResnetDownsampleBlock2D"),
    ],
)
def test_says_what_it_cannot_fuse(fields, reason):
    assert reason in SD_UNET.check(unet(**fields))


def test_says_what_a_call_brings():
    assert SD_UNET.declines(cross_attention_kwargs={"gligen": {}, "scale": 1.0}) == "the call brings gligen"
    assert "encoder_attention_mask" in SD_UNET.declines(encoder_attention_mask=torch.ones(1, 7))
