import math

import pytest
import torch

from vivace.errors import InputError
from vivace.evals.features import extract
from vivace.evals.fid import Moments, fid, symmetric_root


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 1000) -> Moments:
    """Exactly these moments, as a very large sample would have them."""
    mean, covariance = mean.double(), covariance.double()
    return Moments(count=count, mean=mean, scatter=covariance * (count - 1))


def samples(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int = 3) -> torch.Tensor:
    return torch.linalg.qr(samples(width, width, seed)).Q


def test_fid_of_shifted_gaussians_is_the_squared_shift():
    mix = samples(8, 8)
    covariance, shift = mix @ mix.T, torch.arange(8.0)
    assert fid(gaussian(torch.zeros(8), covariance), gaussian(shift, covariance)) == pytest.approx(140.0, rel=1e-10)


def test_fid_of_commuting_covariances_is_the_squared_difference_of_deviations():
    turn, a, b = rotation(4), torch.tensor([1.0, 2, 3, 0]).double(), torch.tensor([4.0, 2, 0, 0]).double()
    first = gaussian(torch.zeros(4), turn @ a.square().diag() @ turn.T)
    second = gaussian(torch.zeros(4), turn @ b.square().diag() @ turn.T)
    assert fid(first, second) == pytest.approx((a - b).square().sum().item(), rel=1e-10)


def test_fid_of_covariances_that_do_not_commute_is_the_closed_form_in_two_dimensions():
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[5.0, -2.0], [-2.0, 1.0]])
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    distance = fid(gaussian(torch.zeros(2), a), gaussian(torch.zeros(2), b))
    assert distance == pytest.approx((a.trace() + b.trace()).item() - 2 * root, rel=1e-6)


def test_a_set_is_at_distance_zero_from_itself_even_with_a_singular_covariance():
    features = samples(500, 40)[:, :20] @ samples(20, 40, seed=1)
    assert fid(Moments.of(features), Moments.of(features)) < 1e-9


def test_two_samples_of_one_gaussian_are_close_and_a_wider_one_is_not():
    one, other, wide = (samples(20_000, 16, seed) for seed in (0, 1, 2))
    assert fid(Moments.of(one), Moments.of(other)) < 0.02
    assert fid(Moments.of(one), Moments.of(2 * wide)) == pytest.approx(16.0, rel=0.05)


def test_streamed_moments_equal_those_of_all_at_once_far_from_zero():
    features = samples(1003, 6) + 1e6
    streamed = Moments.stream(iter(features.split(17)))
    assert streamed.count == 1003
    torch.testing.assert_close(streamed.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(streamed.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)


def test_a_symmetric_root_squares_to_the_matrix():
    mix = samples(12, 5)
    root = symmetric_root(mix @ mix.T)
    torch.testing.assert_close(root @ root, mix @ mix.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root, root.T)


def test_too_few_samples_and_unlike_features_are_refused():
    with pytest.raises(InputError, match="more than 16 samples a side, got 16 generated"):
        fid(Moments.of(samples(16, 16)), Moments.of(samples(100, 16)))
    with pytest.raises(InputError, match="got 3 and 4 wide"):
        fid(Moments.of(samples(9, 3)), Moments.of(samples(9, 4)))
    with pytest.raises(InputError, match="at least one batch"):
        Moments.stream([])
    with pytest.raises(InputError, match="1 of 9 feature vectors are not finite"):
        Moments.of(samples(9, 3).index_fill(0, torch.tensor(4), math.nan))


def test_features_pass_through_in_batches():
    batches = [torch.rand(3, 3, 4, 4), torch.rand(2, 3, 4, 4)]
    features = torch.cat(list(extract(lambda pictures: pictures.mean((2, 3)), batches)))
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), torch.cat(batches).mean((2, 3)))
    with pytest.raises(InputError, match=r"\[3, D\], got \[3, 3, 4\]"):
        list(extract(lambda pictures: pictures.mean(3), batches))
