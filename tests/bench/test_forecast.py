"""A forecast counts kernels and bytes: of one operation as they are, and fewer of them for fused blocks."""

import pytest
import torch

from vivace.bench.forecast import Forecast, _counted, forecast
from vivace.families import FAMILIES


def test_one_of_each_kind():
    counted = Forecast()
    with _counted(counted):
        x = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
        y = x.t().contiguous().view(2, 4, 4)[0]  # one pass
        assert (counted.launches, counted.gigabytes) == (1, 2 * 64 / 1e9)
        y @ x  # one product
        assert (counted.launches, counted.tflop) == (2, 2 * 4 * 4 * 8 / 1e12)
        q = torch.empty(1, 16, 2, 8, device="meta")
        torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3)
    assert counted.launches == 3
    assert counted.attention == pytest.approx(4 * 2 * 16 * 16 * 8 / 647e12 * 1e3)


def test_fused_blocks_launch_less_and_move_less():
    _, stock = forecast(FAMILIES["qwen_image"], size=(256, 256), fused=False)
    once, fused = forecast(FAMILIES["qwen_image"], size=(256, 256))
    assert once.launches > 0
    assert fused.launches < stock.launches / 3
    assert fused.gigabytes < stock.gigabytes / 3
    assert fused.ms < stock.ms
    assert once.tflop + fused.tflop == pytest.approx(stock.tflop, rel=1e-3)
