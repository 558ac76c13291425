"""Folded tokens weigh what the tokens they stand for weigh."""

import math

import pytest
import torch
import torch.nn.functional as F

from vivace.fused.fold import fold_zero_tokens, log_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 77, 256, 512])
def test_weights_sum_to_the_count(count, dtype):
    weights = log_weights(count, dtype)
    assert sum(map(math.exp, weights)) == pytest.approx(count, rel=2e-6)
    assert all(torch.tensor(weight, dtype=dtype).item() == weight for weight in weights)
    assert len(weights) <= 4


def test_attention_over_folded_tokens_is_attention_over_all():
    text = torch.randn(2, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text[:, 9:] = 0
    folded = fold_zero_tokens(text)
    assert folded.text.shape[1] < 20
    # A projection with a bias: the zero tokens do not stay zero, only identical.
    keys, few = text + 0.3, folded.text + 0.3
    whole = F.scaled_dot_product_attention(text[:, None, :9], keys[:, None], keys[:, None])
    part = F.scaled_dot_product_attention(text[:, None, :9], few[:, None], few[:, None], attn_mask=folded.bias)
    torch.testing.assert_close(part, whole, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("used", [0, 9, 19, 20])
def test_a_repeated_key_is_every_key(used):
    text = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    text[:, used:] = 0
    folded = fold_zero_tokens(text, repeat=True)
    assert folded.bias is None
    assert folded.text.shape[1] == min(used + 1, 20)
    again = torch.cat((folded.text, folded.text[:, -1:].expand(-1, folded.repeats, -1)), dim=1)
    assert torch.equal(again, text)


@pytest.mark.parametrize("text", [torch.ones(2, 5, 4), F.pad(torch.ones(2, 5, 4), (0, 0, 0, 1))])
def test_nothing_to_fold(text):
    folded = fold_zero_tokens(text)
    assert folded.text is text
    assert folded.bias is None


def test_a_zero_tail_counts_only_where_the_whole_batch_has_it():
    text = torch.zeros(2, 12, 4)
    text[0, :3] = 1
    text[1, :5] = 1
    assert fold_zero_tokens(text).text.shape[1] == 5 + len(log_weights(7, torch.float32))


def test_text_of_zeros_only():
    folded = fold_zero_tokens(torch.zeros(1, 256, 4))
    assert folded.text.shape[1] == len(log_weights(256, torch.float32))
