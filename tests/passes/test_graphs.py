"""Which denoisers graphs are for, by rule."""

import pytest

from vivace.families import FAMILIES
from vivace.passes.graphs import wins


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd", True),
        ("sdxl", True),
        ("svd", True),
        ("sd3", True),
        ("flux", False),
        ("qwen_image", False),
        ("wan", False),
    ],
)
def test_small_denoisers_and_unets(family, expected):
    denoiser, media = FAMILIES[family].full(device="meta"), FAMILIES[family].media
    assert wins(denoiser, media=media, sm=(9, 0), quantised=False) is expected
    assert wins(denoiser, media=media, sm=(9, 0), quantised=True)


def test_tiny_ones_of_every_kind():
    assert wins(FAMILIES["sd3"].tiny().transformer, media=None, sm=(7, 5), quantised=False)
