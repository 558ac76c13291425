import pytest
import torch

from vivace.errors import InputError
from vivace.evals.kid import kid, squared_mmd


def samples(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_mmd_is_the_double_sum_of_the_definition():
    x, y = samples(5, 3, 0), samples(4, 3, 1)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    xs, ys = x.tolist(), y.tolist()
    expected = (
        mean(kernel(a, b) for i, a in enumerate(xs) for j, b in enumerate(xs) if i != j)
        + mean(kernel(a, b) for i, a in enumerate(ys) for j, b in enumerate(ys) if i != j)
        - 2 * mean(kernel(a, b) for a in xs for b in ys)
    )
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased_and_its_standard_error_honest():
    # 200 independent measurements of one distribution against itself: mean 0, scatter as each one says.
    found = [kid(samples(400, 4, 2 * i), samples(400, 4, 2 * i + 1), subset_size=50) for i in range(200)]
    scores = torch.tensor([k.value / k.standard_error for k in found])
    values = torch.tensor([k.value for k in found])
    assert found[0].subsets == 8
    assert values.mean().abs() < 4 * values.std() / 200**0.5
    assert (values < 0).any()
    # Student's t of 7 degrees of freedom has a deviation of 1.18.
    assert 0.95 < scores.std() < 1.45


def test_kid_finds_a_shift_and_repeats_itself():
    x, y = samples(2000, 8, 0), samples(2000, 8, 1) + 0.3
    first = kid(x, y, subset_size=200)
    assert first.value > 5 * first.standard_error
    assert first == kid(x, y, subset_size=200)
    # E k(x, y) for x ~ N(0, I), y ~ N(m, I), the cubic kernel and s = m.m: by moments of Gaussian products.
    assert first.value == pytest.approx(expected_shift(8, 8 * 0.09), abs=4 * first.standard_error)


def expected_shift(width: int, square: float) -> float:
    """E of the kernel on two samples of the shifted, two of the plain one, minus twice across.

    x.y given y is N(0, |y|²), so E (x.y / D + 1)³ = 1 + 3 E|y|² / D² for plain x; for two shifted ones
    x.y has mean s, variance D + 2s + third central moment 6s, by expanding (u + m).(v + m).
    """

    def cubed(mean: float, variance: float, third: float) -> float:
        mean, variance, third = mean / width + 1, variance / width**2, third / width**3
        return mean**3 + 3 * mean * variance + third

    return cubed(square, width + 2 * square, 6 * square) + cubed(0, width, 0) - 2 * cubed(0, width + square, 0)


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="got 1999 and 5000"):
        kid(torch.zeros(1999, 4), torch.zeros(5000, 4))
    with pytest.raises(InputError, match="got 4 and 5 wide"):
        kid(torch.zeros(8, 4), torch.zeros(8, 5), subset_size=4)
