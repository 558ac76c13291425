import pytest

from vivace.errors import InputError
from vivace.evals.accuracy import Accuracy, Comparison, accuracy_by, compare


def test_accuracy_by_group_counts_each_group_in_order():
    groups = [2, 1, 2, 3, 2]
    by = accuracy_by(groups, [True, True, False, False, True])
    assert list(by) == [1, 2, 3]
    assert by[2] == Accuracy(right=2, total=3)
    assert by[2].share == pytest.approx(2 / 3)
    assert by[3].interval.low == 0.0
    assert 0.7 < by[3].interval.high < 0.8


def test_compare_counts_pairs():
    found = compare([True, True, False, False, True], [True, False, True, False, False])
    assert found == Comparison(both=1, only_first=2, only_second=1, neither=1)
    assert found.difference == pytest.approx(0.2)
    assert found.interval.low < 0.2 < found.interval.high


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(6, 16, 0.052479), (0, 0, 1.0), (5, 5, 1.0), (0, 10, 2 / 1024), (3000, 2000, 0.0)],
)
def test_mcnemar_is_the_exact_binomial_test(first, second, p):
    found = Comparison(both=59, only_first=first, only_second=second, neither=80)
    assert found.p_value == pytest.approx(p, abs=1e-6)


def test_unequal_and_empty_lists_are_refused():
    with pytest.raises(InputError, match="got 2 and 1"):
        accuracy_by([1, 2], [True])
    with pytest.raises(InputError, match="got 1 and 2"):
        compare([True], [True, False])
    with pytest.raises(InputError, match="empty"):
        compare([], [])
    with pytest.raises(InputError, match="empty"):
        Accuracy.of([])
