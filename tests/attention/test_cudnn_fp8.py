"""fp8 attention: what is quantised and how, with cuDNN's own arithmetic written out in torch where there is no GPU."""

import importlib.util

import pytest
import torch

from vivace.attention import backend_of, cudnn_fp8
from vivace.attention.cudnn_fp8 import Call, attend_heads, quantised, rows_of, serves
from vivace.attention.native import NATIVE

E4M3 = torch.float8_e4m3fn


def written_out(call: Call, q, k, v) -> torch.Tensor:
    """e4m3 [B, S, H, D] in and out: softmax's numerators in e4m3 times PROBABILITIES, sums in fp32."""
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) * call.scale
    numerators = (logits - logits.amax(-1, keepdim=True)).exp()
    stored = (numerators * cudnn_fp8.PROBABILITIES).to(E4M3).float() / cudnn_fp8.PROBABILITIES
    return (stored @ v / numerators.sum(-1, keepdim=True)).transpose(1, 2).to(E4M3).contiguous()


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(cudnn_fp8, "_run", written_out)


def heads(*, batch: int = 2, tokens: int = 256, depth: int = 64, seed: int = 0):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, tokens, 3, depth) for _ in range(3))


def error(q, k, v, **options) -> float:
    exact = NATIVE.attend(q, k, v).flatten(2)
    got = rows_of(attend_heads(q, k, v, **options), dtype=torch.float32)
    return ((got - exact).norm() / exact.norm()).item()


def test_close_to_exact(emulated):
    assert 0.01 < error(*heads()) < 0.065


def test_smoothing_removes_what_all_keys_share(emulated):
    q, k, v = heads()
    # Far outside what e4m3 says with three digits, but the same for every key: softmax does not see it.
    k = k + 40 * torch.randn(1, 1, 3, 64)
    assert error(q, k, v) < 0.07
    unsmoothed = written_out(Call(2, 3, 256, 256, 64, 0.125, k.device), q.to(E4M3), k.to(E4M3), v.to(E4M3))
    exact = NATIVE.attend(q, k, v)
    assert ((unsmoothed.float() - exact).norm() / exact.norm()).item() > 0.3


def test_rotation_changes_no_logit(emulated):
    q, k, v = heads()
    exact = torch.einsum("bshd,bthd->bhst", q, k - k.mean(1, keepdim=True))
    for rotate in (False, True):
        q8, k8, _ = quantised(q, k, v, rotate=rotate)
        logits = torch.einsum("bshd,bthd->bhst", q8.float(), k8.float())
        assert ((logits - exact).norm() / exact.norm()).item() < 0.05


def test_heads_of_v_have_scales_of_their_own(emulated):
    q, k, v = heads()
    v = v * torch.tensor([1e-5, 1.0, 1e5])[:, None]
    exact, got = NATIVE.attend(q, k, v), attend_heads(q, k, v)
    difference = got.values.float() * got.scales[:, None, :, None] - exact
    assert (difference.square().sum((0, 1, 3)).sqrt() / exact.square().sum((0, 1, 3)).sqrt() < 0.07).all()


def test_a_sample_does_not_see_its_neighbour(emulated):
    q, k, v = heads()
    loud = (torch.cat((t[:1], 1e3 * t[1:])) for t in (q, k, v))
    alone, together = attend_heads(q[:1], k[:1], v[:1]), attend_heads(*loud)
    assert torch.equal(together.values[:1].float(), alone.values.float())
    assert torch.equal(together.scales[:1], alone.scales)


def test_the_output_feeds_a_quantised_projection(emulated):
    q, k, v = heads()
    made = attend_heads(q, k, v)
    dense, rows = rows_of(made, dtype=torch.float32), rows_of(made, dtype=torch.float32, quantize="fp8")
    assert ((rows.dense() - dense).norm() / dense.norm()).item() < 0.04


def test_a_normalised_head_needs_no_scale():
    # RMSNorm bounds a head by sqrt(D) times its largest weight, and a rotation of pairs keeps the bound.
    torch.manual_seed(0)
    weight = 3 * torch.rand(128)
    x = torch.nn.functional.rms_norm(torch.randn(1000, 128) ** 5, (128,), weight)
    assert x.abs().max() <= 128**0.5 * weight.max() < 448


def test_masked_and_short_calls_are_natives(monkeypatch):
    monkeypatch.setattr(cudnn_fp8, "_run", None)
    q, k, v = heads()
    mask = torch.zeros(1, 1, 256, 256)
    for name in ("cudnn_fp8", "cudnn_fp8_rotated"):
        attend = backend_of(name).attend
        assert torch.equal(attend(q, k, v), NATIVE.attend(q, k, v))
        assert torch.equal(attend(q, k, v, mask=mask), NATIVE.attend(q, k, v, mask=mask))
    long = torch.empty(1, cudnn_fp8.KEYS, 1, 64, device="meta")
    assert serves(q, long, None)
    assert not serves(q, long, mask)
    assert not serves(torch.empty(1, 9, 1, 72, device="meta"), long, None)
    assert not serves(torch.empty(1, 9, 1, 256, device="meta"), long, None)


def test_long_calls_run_in_fp8(emulated, monkeypatch):
    monkeypatch.setattr(cudnn_fp8, "KEYS", 16)
    q, k, v = heads()
    for name in ("cudnn_fp8", "cudnn_fp8_rotated"):
        out, exact = backend_of(name).attend(q, k, v), NATIVE.attend(q, k, v)
        assert 0.01 < ((out - exact).norm() / exact.norm()).item() < 0.065


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend")
@pytest.mark.parametrize("shape", [(1, 4608, 24, 128), (2, 4096, 10, 64), (1, 1037, 3, 128)])
@pytest.mark.parametrize("name", ["cudnn_fp8", "cudnn_fp8_rotated"])
def test_on_a_gpu(shape, name):
    torch.manual_seed(0)
    # Peaked attention: with flat one an average over thousands of rows hides every error, and every fault.
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * factor for factor in (2, 2, 1))
    exact = NATIVE.attend(q, k, v)
    out = backend_of(name).attend(q, k, v)
    assert ((out - exact).norm() / exact.norm()).item() < 0.08
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = backend_of(name).attend(q, k, v)
    graph.replay()
    assert torch.equal(recorded, out)
