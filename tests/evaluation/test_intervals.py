"""Random groups, the jackknife, and differences of two estimates."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import sem, ttest_1samp

from ctf.common.errors import UserError
from ctf.evaluation.intervals import (
    Difference,
    Estimate,
    RandomGroups,
    difference,
    estimate,
    jackknife,
    leave_one_out,
)


@given(st.integers(0, 60), st.lists(st.integers(0, 17), max_size=8), st.integers(2, 7))
def test_groups_have_equal_sizes_and_do_not_depend_on_the_batches(
    count: int, batches: list[int], size: int
) -> None:
    at_once = RandomGroups(np.random.default_rng(1), size).assign(count)
    ends = np.minimum(np.cumsum(batches, dtype=int), count)
    groups = RandomGroups(np.random.default_rng(1), size)
    sizes = np.diff([0, *ends, count])
    np.testing.assert_array_equal(np.concatenate([groups.assign(n) for n in sizes]), at_once)
    counts = np.bincount(at_once, minlength=size)
    assert counts.sum() == count and counts.max() - counts.min() <= 1 and len(counts) == size


def test_groups_mix_classes_that_alternate() -> None:
    """Image i is of class i % 10, and there are 10 groups."""
    groups_N = RandomGroups(np.random.default_rng(0)).assign(2000)
    shares = np.stack([np.eye(10)[np.flatnonzero(groups_N == g) % 10].mean(0) for g in range(10)])
    # 200 samples with probability a tenth: 0.1 +- 0.02
    assert shares.min() > 0.03 and shares.max() < 0.2
    assert shares.std() == pytest.approx(0.02, rel=0.25)


@given(st.integers(2, 12), st.integers(1, 9))
def test_jackknife_of_a_mean_is_students_interval_of_the_groups(size: int, each: int) -> None:
    values = np.random.default_rng(size).normal(3, 2, size)
    got = jackknife(values, lambda used: float(np.mean(used)), size * each)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert got.value == pytest.approx(values.mean())
    assert got.standard_error == pytest.approx(sem(values))
    assert (got.low, got.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert got.count == size * each


def test_statistics_without_each_group_can_be_combined_first() -> None:
    """As in one statistic of both, here a ratio of means."""
    pairs = np.random.default_rng(0).normal(5, 1, (6, 2))

    def mean(side: int) -> Callable[[Sequence[np.ndarray]], float]:
        return lambda used: float(np.mean([pair[side] for pair in used]))

    ratio = jackknife([*pairs], lambda used: mean(0)(used) / mean(1)(used), 60)
    without_G = leave_one_out([*pairs], mean(0)) / leave_one_out([*pairs], mean(1))
    assert estimate(mean(0)(pairs) / mean(1)(pairs), without_G, 60) == ratio


def test_interval_is_clipped_at_the_lower_bound() -> None:
    got = jackknife([0.0, 5.0, 1.0], lambda used: float(np.mean(used)), 9, lower_bound=0.5)
    assert got.low == 0.5 and got.value == pytest.approx(2) and got.high > 5


def test_difference_of_two_estimates() -> None:
    a, b = (Estimate(v, v - 3, v + h, 1.0, 100) for v, h in ((10.0, 3), (4.0, 4)))
    got = difference(a, b)
    assert got == Difference(6, pytest.approx(1), pytest.approx(11))
    assert got.significant and difference(b, a).significant
    closer = Estimate(5.5, 2.5, 8.5, 1.0, 100)
    assert not difference(a, Estimate(6.5, 3, 10.5, 1.0, 100)).significant
    assert difference(a, closer).significant  # 4.5 against 4.24
    with pytest.raises(UserError, match="of 100 and of 50 images"):
        difference(a, Estimate(4, 1, 7, 1.0, 50))
