"""Estimates with 95 % intervals: the delete-a-group jackknife, and differences of two estimates.

Shapes: G groups, N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ctf.common.errors import UserError

GROUPS = 10  # the usual number of splits of the Inception Score

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A score of `count` images with its standard error and 95 % interval."""

    value: float
    low: float
    high: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Difference:
    """One score minus another, with the 95 % interval of the difference."""

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class RandomGroups:
    """Assigns a stream of images to groups at random.

    Each run of G consecutive images is one random permutation of the groups. Sizes therefore differ
    by at most 1, a group is a random sample even if the images are sorted by class or cycle through
    the classes, and the assignment does not depend on the batches.
    """

    def __init__(self, generator: np.random.Generator, count: int = GROUPS) -> None:
        """`generator` must not be used by anything else; `count` is the number of groups."""
        self.count = count
        self._generator = generator
        self._remaining = np.zeros(0, np.int64)  # the rest of the last permutation

    def assign(self, images: int) -> np.ndarray:
        """Return the groups of the next images: (N,) int64 in [0, G)."""
        runs = -((len(self._remaining) - images) // self.count)
        permutations = [self._generator.permutation(self.count) for _ in range(runs)]
        groups_N, self._remaining = np.split(
            np.concatenate([self._remaining, *permutations]), [images]
        )
        return groups_N


def jackknife(
    groups: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    count: int,
    lower_bound: float = -math.inf,
) -> Estimate:
    """Estimate a statistic and its 95 % interval by the delete-a-group jackknife.

    With s_i the statistic without group i, the standard error is sqrt((G - 1) / G * sum_i
    (s_i - mean s)^2); the interval is Student's t with G - 1 degrees of freedom.

    It covers the expected score of this number of images from the same source. The bias of FID and
    IS at that number is part of the expectation; the choice of the reference is not covered. The
    interval is conservative if both sets have the same distribution, or if all classes have exactly
    the same count, which varies less than random groups do.

    Args:
        groups: what is known of each random group of images.
        statistic: takes all groups, or all but one.
        count: number of images in all groups together.
        lower_bound: smallest possible value; the interval is clipped there.

    Raises:
        UserError: fewer images than groups.
        ValueError: fewer than two groups.
    """
    size = len(groups)
    if size < 2:
        raise ValueError(f"an interval needs 2 groups or more, got {size}")
    if count < size:
        raise UserError(f"got {count} images; an interval over {size} groups needs {size} or more")
    return estimate(statistic(groups), leave_one_out(groups, statistic), count, lower_bound)


def leave_one_out(groups: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> np.ndarray:
    """Return the statistic without each of the groups: (G,)."""
    return np.array([statistic([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))])


def estimate(
    value: float, without_G: np.ndarray, count: int, lower_bound: float = -math.inf
) -> Estimate:
    """Estimate a statistic from its value and those without each of the groups, see `jackknife`.

    Statistics of the same groups of images can be combined first, e.g. into a ratio.
    """
    from scipy.special import stdtrit

    size = len(without_G)
    error = math.sqrt((size - 1) * float(np.var(without_G)))
    half = float(stdtrit(size - 1, 0.975)) * error
    return Estimate(value, max(lower_bound, value - half), value + half, error, count)


def difference(a: Estimate, b: Estimate) -> Difference:
    """Compute a - b with its interval: the root of the sum of both squared half-widths.

    It covers sampling noise, assuming independent samples; if equal seeds make the samples of two
    pipelines similar, it is conservative. It does not cover training noise or the choice of the
    reference, though most of the latter cancels because both scores use the same reference.

    Raises:
        UserError: the scores are of different numbers of images, on which FID and IS depend.
    """
    if a.count != b.count:
        raise UserError(
            f"got scores of {a.count} and of {b.count} images, which are not comparable\n"
            "score the same number of images for both"
        )
    value = a.value - b.value
    # Only the lower end of an interval may have been clipped.
    half = math.hypot(a.high - a.value, b.high - b.value)
    return Difference(value, value - half, value + half)
