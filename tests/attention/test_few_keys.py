"""Attention to few keys by our kernel, to all others by torch's."""

import pytest
import torch

from vivace.attention import few_keys
from vivace.attention.few_keys import FEW_KEYS
from vivace.attention.native import NATIVE


def heads(tokens, depth=40):
    return torch.randn(2, tokens, 3, depth)


@pytest.mark.parametrize(("queries", "keys", "ours"), [(700, 77, 1), (700, 600, 0), (77, 77, 0)])
def test_the_kernel_is_for_many_queries_and_few_keys(queries, keys, ours, monkeypatch):
    torch.manual_seed(0)
    calls = []
    kernel = few_keys.cross_attention
    monkeypatch.setattr(few_keys, "cross_attention", lambda *args, **kw: calls.append(args) or kernel(*args, **kw))
    q, k, v = heads(queries), heads(keys), heads(keys)
    torch.testing.assert_close(FEW_KEYS.attend(q, k, v, scale=0.2), NATIVE.attend(q, k, v, scale=0.2))
    assert len(calls) == ours


def test_a_mask_goes_to_native():
    q, k, v = heads(700), heads(77), heads(77)
    mask = (torch.arange(77) < 30)[None]
    torch.testing.assert_close(FEW_KEYS.attend(q, k, v, mask=mask), NATIVE.attend(q, k, v, mask=mask))


def test_a_head_that_cannot_be_copied_by_16_bytes_goes_to_native():
    q, k, v = heads(700, depth=36), heads(77, depth=36), heads(77, depth=36)
    torch.testing.assert_close(FEW_KEYS.attend(q, k, v), NATIVE.attend(q, k, v))
    with pytest.raises(ValueError, match="a multiple of 8"):
        few_keys.cross_attention(q, k, v)
