import math

import pytest
import torch

from vivace.errors import InputError
from vivace.evals.pairwise import psnr, relative_error, ssim


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_relative_error_is_the_norm_of_the_difference_over_that_of_the_reference():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    output = torch.tensor([[3.0, 4.5], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(output, reference).tolist() == [0.1, 0.0, 0.0, math.inf]


def test_relative_error_sees_what_half_precision_would_lose():
    reference = torch.ones(1, 1 << 16)
    assert relative_error((reference * (1 + 2.0**-10)).half(), reference).item() == 2.0**-10


def test_psnr_of_a_constant_difference_is_known():
    grey = torch.full((2, 3, 16, 16), 0.5)
    shifted = grey + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(shifted, grey).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_of_identical_pictures_ends_at_the_ceiling():
    x = noise(1, 3, 16, 16)
    assert psnr(x, x).item() == 100.0
    assert psnr(x, x, ceiling=math.inf).item() == math.inf


def test_ssim_is_one_for_identical_pictures_and_symmetric():
    x, y = noise(2, 3, 20, 24), noise(2, 3, 20, 24, seed=1)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert ssim(x, y).tolist() == pytest.approx(ssim(y, x).tolist(), abs=1e-12)
    assert (ssim(x, y) < 0.3).all()


def test_ssim_of_flat_pictures_is_the_luminance_term():
    x, y = torch.full((1, 3, 11, 11), 0.25, dtype=torch.float64), torch.full((1, 3, 11, 11), 0.75, dtype=torch.float64)
    assert ssim(x, y).item() == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), abs=1e-12)


def test_ssim_equals_the_paper_in_plain_loops():
    x = noise(1, 3, 13, 12).double()
    y = (0.7 * x + 0.3 * noise(1, 3, 13, 12, seed=1)).double()
    assert ssim(x, y).item() == pytest.approx(loop_ssim(x[0].tolist(), y[0].tolist()), abs=1e-12)


def loop_ssim(x: list, y: list) -> float:
    """Wang et al. 2004, equation 13, one window after the other, variances about the window's mean."""
    reach = range(-5, 6)
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in reach for j in reach}
    total = sum(weights.values())
    values = []
    for plane_x, plane_y in zip(x, y, strict=True):
        for row in range(5, len(plane_x) - 5):
            for column in range(5, len(plane_x[0]) - 5):
                window = [(w / total, plane_x[row + i][column + j], plane_y[row + i][column + j])
                          for (i, j), w in weights.items()]  # fmt: skip
                mx, my = sum(w * a for w, a, _ in window), sum(w * b for w, _, b in window)
                vx, vy = sum(w * (a - mx) ** 2 for w, a, _ in window), sum(w * (b - my) ** 2 for w, _, b in window)
                cov = sum(w * (a - mx) * (b - my) for w, a, b in window)
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("output", "reference", "says"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), "one shape"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), "one shape"),
        (torch.full((1, 3, 16, 16), 255.0), torch.zeros(1, 3, 16, 16), "divide 8-bit"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16), "uint8"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), "nan"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "nothing"),
    ],
)
def test_what_is_no_pair_of_pictures_is_refused(output, reference, says):
    for metric in (psnr, ssim):
        with pytest.raises(InputError, match=says):
            metric(output, reference)


def test_small_pictures_and_unequal_latents_are_refused():
    with pytest.raises(InputError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 3, 10, 64), torch.zeros(1, 3, 10, 64))
    with pytest.raises(InputError, match=r"\[1, 4\] and \[1, 5\]"):
        relative_error(torch.zeros(1, 4), torch.zeros(1, 5))
