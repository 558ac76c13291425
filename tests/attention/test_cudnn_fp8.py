"""fp8 attention: what is quantised and how, with cuDNN's own arithmetic written out in torch where there is no GPU."""

import importlib.util

import pytest
import torch

from vivace.attention import backend_of, cudnn_fp8
from vivace.attention.cudnn_fp8 import Call, attend_packed, packed, serves
from vivace.attention.native import NATIVE
from vivace.kernels.unscale_heads import unscale_heads

E4M3 = torch.float8_e4m3fn


def heads(*, batch: int = 2, tokens: int = 256, depth: int = 64, seed: int = 0):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, tokens, 3, depth) for _ in range(3))


def peaked(shape, *, device="cpu"):
    """Logits of standard deviation 4: with flat ones an average over all rows hides every error, and every fault."""
    torch.manual_seed(0)
    return tuple(torch.randn(shape, device=device, dtype=torch.bfloat16) * factor for factor in (2, 2, 1))


def distance(out, exact) -> float:
    return ((out.float() - exact.float()).norm() / exact.float().norm()).item()


def error(q, k, v) -> float:
    exact = NATIVE.attend(q, k, v).flatten(2)
    return distance(attend_packed(packed(q, k, v, rotate=False)).dense(), exact)


def test_close_to_exact(emulated_fp8):
    assert 0.01 < error(*heads()) < 0.065


def test_smoothing_removes_what_all_keys_share(emulated_fp8):
    q, k, v = heads()
    # Far outside what e4m3 says with three digits, but the same for every key: softmax does not see it.
    k = k + 40 * torch.randn(1, 1, 3, 64)
    assert error(q, k, v) < 0.07
    unsmoothed = emulated_fp8(Call(2, 3, 256, 256, 64, 0.125, k.device), q.to(E4M3), k.to(E4M3), v.to(E4M3))
    exact = NATIVE.attend(q, k, v)
    assert ((unsmoothed.float() - exact).norm() / exact.norm()).item() > 0.3


def test_rotation_changes_no_logit(emulated_fp8):
    q, k, v = heads()
    exact = torch.einsum("bshd,bthd->bhst", q, k - k.mean(1, keepdim=True))
    for rotate in (False, True):
        q8, k8, *_ = packed(q, k, v, rotate=rotate)
        logits = torch.einsum("bshd,bthd->bhst", q8.float(), k8.float())
        assert ((logits - exact).norm() / exact.norm()).item() < 0.05


def test_heads_of_v_have_scales_of_their_own(emulated_fp8):
    q, k, v = heads()
    v = v * torch.tensor([1e-5, 1.0, 1e5])[:, None]
    exact, got = NATIVE.attend(q, k, v), attend_packed(packed(q, k, v, rotate=False))
    difference = got.values.float() * got.scales[:, None, :, None] - exact
    assert (difference.square().sum((0, 1, 3)).sqrt() / exact.square().sum((0, 1, 3)).sqrt() < 0.07).all()


def test_a_sample_does_not_see_its_neighbour(emulated_fp8):
    q, k, v = heads()
    loud = (torch.cat((t[:1], 1e3 * t[1:])) for t in (q, k, v))
    alone, together = (attend_packed(packed(*t, rotate=False)) for t in ((q[:1], k[:1], v[:1]), loud))
    assert torch.equal(together.values[:1].float(), alone.values.float())
    assert torch.equal(together.scales[:1], alone.scales)


def test_the_output_feeds_a_quantised_projection(emulated_fp8):
    made = attend_packed(packed(*heads(), rotate=False))
    rows = unscale_heads(made, dtype=torch.float32, quantize="fp8")
    assert distance(rows.dense(), made.dense()) < 0.04


def test_masked_and_short_calls_are_natives(monkeypatch):
    monkeypatch.setattr(cudnn_fp8, "_run", None)
    q, k, v = heads()
    mask = torch.zeros(1, 1, 256, 256)
    for name in ("cudnn_fp8", "cudnn_fp8_rotated"):
        attend = backend_of(name).attend
        assert torch.equal(attend(q, k, v), NATIVE.attend(q, k, v))
        assert torch.equal(attend(q, k, v, mask=mask), NATIVE.attend(q, k, v, mask=mask))
    assert serves(keys=cudnn_fp8.KEYS, depth=64)
    assert not serves(keys=cudnn_fp8.KEYS, depth=64, mask=mask)
    assert not serves(keys=cudnn_fp8.KEYS, depth=72)
    assert not serves(keys=cudnn_fp8.KEYS, depth=256)


def test_long_calls_run_in_fp8(emulated_fp8, monkeypatch):
    monkeypatch.setattr(cudnn_fp8, "KEYS", 16)
    q, k, v = heads()
    for name in ("cudnn_fp8", "cudnn_fp8_rotated"):
        out, exact = backend_of(name).attend(q, k, v), NATIVE.attend(q, k, v)
        assert 0.01 < ((out - exact).norm() / exact.norm()).item() < 0.065


def test_a_tenth_is_what_peaked_logits_cost(emulated_fp8):
    """Three digits of q and k move a logit by 0.036 of its 4, which softmax turns into that share of an output."""
    for shape in ((1, 1037, 2, 128), (1, 1100, 2, 64)):
        q, k, v = peaked(shape)
        assert 0.08 < distance(backend_of("cudnn_fp8").attend(q, k, v), NATIVE.attend(q, k, v)) < 0.12


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend")
@pytest.mark.parametrize("shape", [(1, 4608, 24, 128), (2, 4096, 10, 64), (1, 1037, 3, 128)])
@pytest.mark.parametrize("name", ["cudnn_fp8", "cudnn_fp8_rotated"])
def test_on_a_gpu(shape, name, request):
    q, k, v = peaked(shape, device="cuda")
    exact, attend = NATIVE.attend(q, k, v), backend_of(name).attend
    out = attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = attend(q, k, v)
    graph.replay()
    assert torch.equal(recorded, out)
    request.getfixturevalue("emulated_fp8")
    expected = attend(q, k, v)
    # Its error is that of its arithmetic, so it is nearer to the emulation than both are to 16 bit.
    assert distance(out, exact) < 1.15 * distance(expected, exact)
    assert distance(out, expected) < 0.7 * distance(expected, exact)
