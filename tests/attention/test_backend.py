"""Every backend declares itself and refuses, with what to do, where it cannot run."""

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vivace import InputError
from vivace.attention import BACKENDS, backend_of
from vivace.attention.backend import within_bounds
from vivace.attention.native import NATIVE


@pytest.mark.parametrize("name", BACKENDS)
def test_declares_itself(name):
    backend = backend_of(name)
    assert backend.name == name
    assert (backend.package is None) == (backend.install == "")


@pytest.mark.parametrize("name", [name for name in BACKENDS if backend_of(name).package])
def test_not_installed_says_what_to_install(name, monkeypatch):
    """Where it would run: nobody is sent for a package that is of no use there."""
    backend = backend_of(name)
    if importlib.util.find_spec(backend.package) is not None:
        pytest.skip(f"{backend.package} is installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: backend.since)
    assert backend.install in backend.refuses(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert "not on cpu" in backend.refuses(device=torch.device("cpu"), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    old = backend.refuses(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert (backend.since is None) == (backend.install in old)


def test_a_head_or_a_mask_that_it_does_not_take_is_named():
    attend = within_bounds(replace(NATIVE, name="sage", masks=False, depth=16))
    q = torch.randn(1, 5, 2, 16)
    assert torch.equal(attend(q, q, q), NATIVE.attend(q, q, q))
    with pytest.raises(InputError, match=r"attention='sage' cannot .* heads larger than 16 at \(1, 5, 2, 24\)"):
        attend(*[torch.randn(1, 5, 2, 24)] * 3)
    with pytest.raises(InputError, match="a mask"):
        attend(q, q, q, mask=torch.ones(1, 5, dtype=torch.bool))


def test_refuses_device_and_dtype():
    assert "not on cpu" in backend_of("cudnn").refuses(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert "not float32" in backend_of("cudnn").refuses(device=torch.device("cuda"), dtype=torch.float32)
    assert NATIVE.refuses(device=torch.device("cpu"), dtype=torch.float32) is None


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True]]), torch.tensor([[0.0, 1.5, -2.0]])])
def test_native_is_sdpa_in_token_major_layout(mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=0.2)
    torch.testing.assert_close(NATIVE.attend(q, k, v, mask=mask, scale=0.2), expected.transpose(1, 2))
