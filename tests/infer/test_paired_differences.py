"""Bootstrap intervals against the definition, and what is concluded from them."""

import numpy as np
import pytest

from infer.paired_differences import RESAMPLES, Interval, bootstrap, verdict


def test_an_interval_is_that_of_resampled_means():
    values = np.random.default_rng(3).exponential(size=20)
    rng = np.random.default_rng(7)
    means = sorted(np.mean([values[draw] for draw in row]) for row in rng.integers(0, 20, (RESAMPLES, 20)))
    found = bootstrap(values, seed=7)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(means[RESAMPLES // 40], rel=1e-2)
    assert found.high == pytest.approx(means[-RESAMPLES // 40], rel=1e-2)


def test_the_interval_covers_a_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap(rng.normal(2, 1, 30)) for _ in range(100)]
    assert 85 <= sum(interval.low <= 2 <= interval.high for interval in found) <= 99


@pytest.mark.parametrize(
    ("interval", "found"),
    [
        ((0.2, 0.1, 0.3), "as in the paper"),
        ((-0.2, -0.3, -0.1), "the other way round"),
        ((0.1, -0.1, 0.3), "not distinguishable"),
        ((0.0, 0.0, 0.0), "not distinguishable"),
    ],
)
def test_an_interval_without_zero_decides(interval, found):
    assert verdict(Interval(*interval)) == found


def test_what_is_confirmed_may_have_a_name_of_its_own():
    assert verdict(Interval(0.2, 0.1, 0.3), "as expected") == "as expected"
