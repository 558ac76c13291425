"""What the cases of GroupNorm cannot reach at a test's size."""

import pytest
import torch

from vivace.kernels import group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_several_tiles_a_chunk(last, monkeypatch):
    monkeypatch.setattr(group_norm_silu, "_CHUNKS", 2)
    kernel = group_norm_silu.KERNEL
    arguments = group_norm_silu._make(
        group_norm_silu.Draw(device=DEVICE, dtype=torch.float32),
        channels=64,
        size=(43, 45),
        groups=2,
        last=last,
        mean=3.0,
    )
    torch.testing.assert_close(kernel.launch(**arguments), kernel.reference(**arguments), rtol=2e-5, atol=2e-5)


def test_memory_that_is_neither_layout():
    x = torch.randn(2, 7, 64, 5, device=DEVICE).permute(0, 2, 1, 3)
    weight, bias = torch.randn(2, 64, device=DEVICE)
    y = group_norm_silu.group_norm_silu(x, groups=8, weight=weight, bias=bias, silu=False)
    torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 8, weight, bias), rtol=2e-5, atol=2e-5)


def test_what_does_not_fit():
    x, weight = torch.randn(1, 30, 4, 4), torch.ones(30)
    with pytest.raises(ValueError, match="8 groups do not divide the 30 channels"):
        group_norm_silu.group_norm_silu(x, groups=8, weight=weight, bias=weight)
    with pytest.raises(ValueError, match=r"add must be \[1, 30\]"):
        group_norm_silu.group_norm_silu(x, groups=5, weight=weight, bias=weight, add=torch.ones(1, 30, 1, 1))


def test_parts_that_do_not_join():
    x, weight = torch.randn(1, 30, 4, 4), torch.ones(30)
    norm = {"groups": 5, "weight": weight, "bias": weight}
    for parts in ({}, {"y": x, "skip": x}, {"y": x[:, :, :2]}, {"y": x.double()}, {"skip": x[..., :3]}):
        with pytest.raises(ValueError, match="either y as x, or skip as x but for its channels"):
            group_norm_silu.join_norm_silu(x, **parts, **norm)
    with pytest.raises(ValueError, match=r"y_bias must be \[30\]"):
        group_norm_silu.join_norm_silu(x, y=x, y_bias=torch.ones(1), **norm)
    with pytest.raises(ValueError, match=r"weight must be \[31\]"):
        group_norm_silu.join_norm_silu(x, skip=x[:, :1], **norm | {"groups": 1})
