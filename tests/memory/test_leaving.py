"""Copies to the host through two small buffers hold what left."""

import pytest
import torch

from vivace.memory import leaving
from vivace.memory.leaving import Leaving

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_every_byte_arrives(device, dtype, monkeypatch):
    monkeypatch.setattr(leaving, "PART", 48)
    leave = Leaving()
    for shape in ((7, 13), (3,), (), (0, 4), (64, 64)):
        tensor = torch.randint(0, 250, shape, device=device).to(dtype)
        copy = leave(tensor)
        assert copy.device.type == "cpu"
        assert copy.data_ptr() != tensor.data_ptr() or not copy.numel()
        assert torch.equal(copy, tensor.cpu())


def test_strides_become_contiguous():
    tensor = torch.arange(12.0).view(3, 4).t()
    copy = Leaving()(tensor)
    assert copy.is_contiguous()
    assert torch.equal(copy, tensor)
