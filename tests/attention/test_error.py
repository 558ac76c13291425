"""The errors of single attention layers, each on what it sees in 16 bit."""

import torch

from vivace.attention import cudnn_fp8
from vivace.attention.cudnn_fp8 import CUDNN_FP8
from vivace.attention.error import attention_errors
from vivace.families import FAMILIES
from vivace.quant.error import by_kind


def test_of_every_layer(emulated_fp8, monkeypatch):
    monkeypatch.setattr(cudnn_fp8, "KEYS", 8)
    family = FAMILIES["flux"]
    denoiser = family.tiny().transformer
    arguments = family.inputs(denoiser, size=(64, 64), batch=1, text_tokens=8)
    with torch.no_grad():
        before = denoiser(**arguments)[0]
    found = attention_errors(denoiser, arguments, backend=CUDNN_FP8)
    assert len(found) == 4
    assert all(0.005 < error < 0.08 for error in found.values()), found
    assert set(by_kind(found)) == {"transformer_blocks.*.attn", "single_transformer_blocks.*.attn"}
    with torch.no_grad():
        assert torch.equal(denoiser(**arguments)[0], before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())
