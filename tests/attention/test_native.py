"""torch's own order of its kernels outlives our choices."""

import subprocess
import sys

import pytest
import torch

from vivace.attention.native import settle_order

ORDER = """
import torch
from vivace.attention.native import NATIVE, settle_order
q = torch.empty(1, 2048, 2, 64, device="cuda", dtype=torch.bfloat16)
{first}
NATIVE.attend(q, q, q)
NATIVE.attend(q, q[:, :77], q[:, :77])
print(torch._C._get_sdp_priority_order())
"""


def test_settling_asks_torch_and_computes_nothing():
    before = torch._C._get_sdp_priority_order()
    settle_order(torch.device("cpu"))
    settle_order(torch.device("meta"))
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.gpu
def test_a_choice_of_ours_leaves_the_order_that_torch_would_have_had():
    def order(first):
        run = [sys.executable, "-c", ORDER.format(first=first)]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout

    plain = "x = q.transpose(1, 2); torch.nn.functional.scaled_dot_product_attention(x, x, x)"
    assert order("settle_order(q.device)") == order(plain)
