"""The time that a cache saved."""

from vivace.cache.tally import Count


def test_a_first_call_that_compiles_is_no_measure_of_the_skipped_ones():
    computed = [(False, 0.0, 9.0), *((False, 10.0 + i, 11.0 + i) for i in range(4))]
    skipped = [(True, 20.0, 20.25), (True, 30.0, 30.25)]
    count = Count(computed=5, skipped=2, spans=[*computed, *skipped])
    assert count.to_dict()["saved_s"] == 1.5
