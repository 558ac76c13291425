"""Which denoisers graphs are for, by rule."""

import pytest

from vivace.families import FAMILIES
from vivace.passes.graphs import wins


@pytest.mark.parametrize(
    ("family", "expected"), [("sd", True), ("sdxl", True), ("flux", False), ("sd3", False), ("wan", False)]
)
def test_small_denoisers_and_unets(family, expected):
    denoiser = FAMILIES[family].full(device="meta")
    assert wins(denoiser, sm=(9, 0), quantised=False) is expected
    assert wins(denoiser, sm=(9, 0), quantised=True)


def test_tiny_ones_of_every_kind():
    assert wins(FAMILIES["sd3"].tiny().transformer, sm=(7, 5), quantised=False)
