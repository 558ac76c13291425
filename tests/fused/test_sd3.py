"""The fused SD3 blocks compute what the stock transformer computes."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

import vivace
from vivace import PRESETS
from vivace.attention.native import NATIVE
from vivace.families import FAMILIES
from vivace.fused import sd3
from vivace.fused.elementwise import KERNELS, TORCH
from vivace.fused.fold import Folded, fold_zero_tokens
from vivace.fused.sd3 import SD3

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the stock RMSNorm works in fp32, whatever the type


def transformer(*, dtype=torch.float64, qk_norm="rms_norm", **fields) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 8,
        "qk_norm": qk_norm,
    }
    model = SD3Transformer2DModel(**{**config, **fields}).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def inputs(*, dtype=torch.float64, zeros=16, size=8) -> dict:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 7 + zeros, 24, generator=generator)
    text[:, 7:] = 0
    return {
        "hidden_states": torch.randn(2, 4, size, size, generator=generator).to(dtype),
        "encoder_hidden_states": text.to(dtype),
        "pooled_projections": torch.randn(2, 20, generator=generator).to(dtype),
        "timestep": torch.tensor([300.0, 700.0]),
        "return_dict": False,
    }


def both(model, arguments, *, form=TORCH) -> tuple[torch.Tensor, torch.Tensor]:
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        return SD3.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=form)(**arguments)[0], stock


@pytest.mark.parametrize("zeros", [0, 1, 16])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": None}, {"dual_attention_layers": (0, 1)}])
def test_equals_stock(zeros, fields):
    fused, stock = both(transformer(**fields), inputs(zeros=zeros))
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize("zeros", [0, 1, 16])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": None}, {"dual_attention_layers": (0, 1)}])
def test_kernels_equal_stock(zeros, fields):
    model, arguments = transformer(dtype=torch.float32, **fields), inputs(dtype=torch.float32, zeros=zeros)
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)[0]
        fused = SD3.fuse(model, attend=NATIVE.attend, undo=undo, elementwise=KERNELS)(**arguments)[0]
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_to_fp64_as_stock(dtype):
    exact, _ = both(transformer(), inputs())
    fused, stock = both(transformer(dtype=dtype), inputs(dtype=dtype))
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (fused, stock))
    assert ours <= 1.2 * theirs


def test_another_size_and_the_output_object():
    arguments = {**inputs(size=6), "return_dict": True}
    model = transformer()
    with ExitStack() as undo, torch.no_grad():
        stock = model(**arguments)
        fused = SD3.fuse(model, attend=NATIVE.attend, undo=undo)(**arguments)
    assert type(fused) is type(stock)
    torch.testing.assert_close(fused.sample, stock.sample, **CLOSE)


RESIDUALS = {"block_controlnet_hidden_states": [torch.ones(2, 16, 16, dtype=torch.float64)]}


@pytest.mark.parametrize("form", [TORCH, KERNELS], ids=["torch", "kernels"])
@pytest.mark.parametrize(
    "extra",
    [RESIDUALS, {"skip_layers": [1]}, {"skip_layers": [0, 2]}, RESIDUALS | {"skip_layers": [1]}],
    ids=["control", "skipped", "first and last skipped", "control and skipped"],
)
@pytest.mark.parametrize("dual", [(), (0, 1)], ids=["", "dual"])
def test_control_residuals_and_skipped_layers(form, extra, dual):
    model = transformer(dual_attention_layers=dual)
    fused, stock = both(model, {**inputs(), **extra}, form=form)
    torch.testing.assert_close(fused, stock, **CLOSE)


@pytest.mark.parametrize("asked", [*PRESETS, {"quant": "int8"}, {"quant": "fp8"}], ids=str)
def test_folding_an_absent_t5_changes_nothing(asked, monkeypatch):
    """At every preset: identical tokens stay identical through every layer, also through layers of 8 bits."""
    denoiser = FAMILIES["sd3"].tiny().transformer
    arguments = FAMILIES["sd3"].inputs(denoiser, size=(64, 64), text_tokens=77 + 32)
    arguments["encoder_hidden_states"][:, 77:] = 0
    drawn = []
    for fold in (fold_zero_tokens, lambda text, repeat: Folded(text=text)):
        folded = []
        monkeypatch.setattr(
            sd3,
            "fold_zero_tokens",
            lambda text, fold=fold, folded=folded, **how: folded.append(fold(text, **how)) or folded[0],
        )
        vivace.accelerate(denoiser, asked)
        with torch.no_grad():
            drawn.append(denoiser(**arguments)[0])
        assert set(vivace.report(denoiser).calls["denoiser"]) == {"fused blocks"}
        assert (folded[0].text.shape[1] < 80) == (fold is fold_zero_tokens)
        vivace.restore(denoiser)
    torch.testing.assert_close(*drawn, **CLOSE)


def test_says_what_it_cannot_fuse():
    model = transformer()
    assert SD3.check(model) is None
    model.transformer_blocks[1].attn.processor = FusedJointAttnProcessor2_0()
    assert SD3.check(model) == "transformer_blocks.1 has a FusedJointAttnProcessor2_0"
    assert "ip_hidden_states" in SD3.declines(joint_attention_kwargs={"ip_hidden_states": 0})
    assert SD3.declines(joint_attention_kwargs={"scale": 1.0}) is None
