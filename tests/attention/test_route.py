"""Stock attention goes through the chosen backend, and calls that a backend cannot do are errors."""

import pytest
import torch
import torch.nn.functional as F

from vivace.attention.backend import Backend
from vivace.attention.native import NATIVE
from vivace.attention.route import Route
from vivace.errors import InputError

CALLS = []


def plain(q, k, v, *, mask=None, scale=None):
    CALLS.append(tuple(q.shape))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(scale).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


PLAIN = Backend(name="plain", attend=plain, devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}))


def qkv(heads=4):
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 8)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_routes_and_equals(scale):
    q, k, v = qkv()
    stock = F.scaled_dot_product_attention(q, k, v, scale=scale)
    CALLS.clear()
    with Route(PLAIN):
        routed = F.scaled_dot_product_attention(q, k, value=v, scale=scale)
    assert CALLS == [(2, 5, 4, 8)]
    torch.testing.assert_close(routed, stock)
    F.scaled_dot_product_attention(q, k, v)
    assert len(CALLS) == 1


@pytest.mark.parametrize(
    ("heads", "arguments", "named"),
    [
        (4, {"attn_mask": torch.zeros(5, 7)}, "a mask"),
        (4, {"is_causal": True}, "causal"),
        (2, {"enable_gqa": True}, "grouped heads"),
    ],
)
def test_what_a_backend_cannot_do(heads, arguments, named):
    q, k, v = qkv(heads)
    with Route(PLAIN), pytest.raises(InputError, match=f"'plain' cannot do .* {named}"):
        F.scaled_dot_product_attention(q, k, v, **arguments)
    with Route(NATIVE):
        routed = F.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(routed, F.scaled_dot_product_attention(q, k, v, **arguments))
