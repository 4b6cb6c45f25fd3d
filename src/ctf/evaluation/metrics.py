"""Figures from arrays: pure functions, float64 inside, no models and no files.

Those of pictures and codes, the Inception Score, and the intervals of figures that have no formula
for theirs. `distances` compares the features of two sets of pictures.

Shapes: B images, H height, W width, V codes, N pictures that were classified, K classes,
D features, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ctf.common.errors import UserError

DATA_RANGE = 2.0  # images are floats in [-1, 1]
WINDOW, SIGMA = 11, 1.5  # of the structural similarity
Z_95 = 1.959963984540054  # the normal distribution has 95 % of its mass within +- this
GROUPS = 10  # of images, for an interval: the usual number of splits of the Inception Score


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images, in dB: (B,) float64.

    Args: images (B, 3, H, W) in [-1, 1]. Equal images give infinity.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair(a_BCHW, b_BCHW)
    error_B = (a_BCHW.double() - b_BCHW.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / error_B)


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity of each pair of images, in [-1, 1], 1 for equal ones: (B,) float64.

    Gaussian window of 11 pixels and sigma 1.5 around every pixel, the picture mirrored at its
    borders; K1 = 0.01, K2 = 0.03 (Wang et al., 2004). As torchmetrics computes it; scikit-image
    leaves the borders out and gets slightly different figures.

    Args: images (B, 3, H, W) in [-1, 1], H and W at least 6.

    Raises:
        ValueError: the shapes differ, or the images are smaller.
    """
    _check_pair(a_BCHW, b_BCHW)
    height, width = a_BCHW.shape[2:]
    if min(height, width) <= WINDOW // 2:
        raise ValueError(f"SSIM needs {WINDOW // 2 + 1} pixels or more, got {height}x{width}")
    a, b = a_BCHW.double(), b_BCHW.double()
    rows, columns = _gaussian(height).to(a), _gaussian(width).to(a).T

    def blur(x: Tensor) -> Tensor:
        return rows @ x @ columns

    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian(size: int) -> Tensor:
    """The window as a product: row i of the (size, size) matrix weighs the pixels around i."""
    offsets = torch.arange(WINDOW) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets.double() / SIGMA) ** 2)
    pixels = (torch.arange(size)[:, None] + offsets).abs()
    pixels = torch.minimum(pixels, 2 * (size - 1) - pixels)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, pixels, (weights / weights.sum()).expand(size, -1))


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(
            f"expected two (B, C, H, W) of one shape, got {(*a.shape,)}, {(*b.shape,)}"
        )


def codebook_usage(counts_V: Tensor) -> float:
    """Fraction of the V codes that occur at all, from how often each does: 0 to 1."""
    return float((counts_V > 0).double().mean())


def perplexity(counts_V: Tensor) -> float:
    """exp of the entropy of the code distribution: 1 (one code only) to V (all alike).

    Raises:
        ValueError: nothing was counted.
    """
    total = counts_V.double().sum()
    if not total > 0:
        raise ValueError("perplexity of no codes: every count is 0")
    return float(torch.special.entr(counts_V.double() / total).sum().exp())


@dataclass(frozen=True)
class Accuracy:
    """A fraction of right answers with its 95 % interval; all but `count` in 0 to 1."""

    value: float
    low: float
    high: float
    count: int


def class_accuracy(predicted_N: np.ndarray, wanted_N: np.ndarray) -> Accuracy:
    """How many of N predicted classes are the wanted ones, with the Wilson score interval.

    The interval (Wilson, 1927) stays inside [0, 1], and has a width even when all are right.

    Raises:
        ValueError: there are no predictions, or not as many as wanted classes.
    """
    if predicted_N.shape != wanted_N.shape or predicted_N.size == 0:
        raise ValueError(f"got {predicted_N.shape} predictions for {wanted_N.shape} classes")
    count = predicted_N.size
    p, z2 = float(np.mean(predicted_N == wanted_N)), Z_95**2 / count
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    # At p = 0 and 1 the bounds are 0 and 1 up to rounding.
    return Accuracy(p, max(0.0, centre - half), min(1.0, centre + half), count)


class Statistics(Protocol):
    """What can be gathered image by image, and merged."""

    @property
    def count(self) -> int: ...
    def add(self, rows_ND: Tensor | np.ndarray) -> None: ...
    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self: ...


S = TypeVar("S", bound=Statistics)
T = TypeVar("T")


def as_rows(rows_ND: Tensor | np.ndarray, dim: int | None = None) -> np.ndarray:
    """What a network said of N pictures, as float64 (N, D).

    Raises:
        ValueError: it has not two axes, or not `dim` columns.
        UserError: it has values that are not finite.
    """
    if isinstance(rows_ND, Tensor):
        rows_ND = rows_ND.detach().cpu().double().numpy()
    rows = np.asarray(rows_ND, np.float64)
    if rows.ndim != 2 or rows.shape[1] != (rows.shape[1] if dim is None else dim):
        raise ValueError(f"got an array of shape {rows.shape}, expected (N, {dim or 'D'})")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise UserError(f"the features of {bad} of {len(rows)} images are not finite numbers")
    return rows


class PredictionStatistics:
    """All that the Inception Score needs to know of any number of predictions of K classes."""

    def __init__(self, classes: int) -> None:
        self.count = 0
        self._sum_K = np.zeros(classes)  # of the probabilities
        self._information = 0.0  # sum of p log p

    def add(self, rows_ND: Tensor | np.ndarray) -> None:
        """Args: logits (N, K); log-probabilities are such, too."""
        logits_NK = torch.from_numpy(as_rows(rows_ND, len(self._sum_K)).copy())
        log_p_NK = logits_NK.log_softmax(dim=1)
        p_NK = log_p_NK.exp()
        self.count += len(p_NK)
        self._sum_K += p_NK.sum(dim=0).numpy()
        self._information += float((p_NK * log_p_NK).sum())

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """The statistics of all the predictions of the parts."""
        out = cls(len(parts[0]._sum_K))
        for part in parts:
            out.count += part.count
            out._sum_K += part._sum_K
            out._information += part._information
        return out

    @property
    def score(self) -> float:
        """exp of the mean KL divergence from p(y) to p(y|x) (Salimans et al., 2016): 1 to K.

        Raises:
            UserError: nothing was added.
        """
        if not self.count:
            raise UserError("the Inception Score needs an image in each split: score more images")
        entropy = float(torch.special.entr(torch.from_numpy(self._sum_K / self.count)).sum())
        return math.exp(max(0.0, self._information / self.count + entropy))


class Groups(Generic[S]):
    """Gathers statistics of a stream of images in groups of the same size, drawn at random.

    Each run of G images is dealt out to the G groups in an order of its own. So the sizes differ
    by 1 at most, a group is a random sample even if the classes come in turn or one after
    another, and what is in it does not depend on the batches.
    """

    def __init__(
        self, make: Callable[[], S], generator: np.random.Generator, count: int = GROUPS
    ) -> None:
        """Args: make: empty statistics. generator: used by nothing else."""
        self.parts = [make() for _ in range(count)]
        self._generator = generator
        self._dealt = np.zeros(0, np.int64)  # the groups of the next images

    def add(self, rows_ND: Tensor | np.ndarray) -> None:
        rows_ND, size = as_rows(rows_ND), len(self.parts)
        runs = -((len(self._dealt) - len(rows_ND)) // size)
        dealt = [self._dealt, *(self._generator.permutation(size) for _ in range(runs))]
        groups_N, self._dealt = np.split(np.concatenate(dealt), [len(rows_ND)])
        for group, part in enumerate(self.parts):
            part.add(rows_ND[groups_N == group])

    def merged(self) -> S:
        """The statistics of all images."""
        return type(self.parts[0]).merged(self.parts)


@dataclass(frozen=True)
class Estimate:
    """A figure of `count` images, its standard error, and its 95 % interval."""

    value: float
    low: float
    high: float
    standard_error: float
    count: int


def jackknife(
    parts: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    count: int,
    least: float = -math.inf,
) -> Estimate:
    """A statistic of G random groups of images, with an interval from leaving each out in turn.

    The delete-a-group jackknife: the G values without one group vary as much as the groups
    differ. Student's t for G - 1 degrees of freedom makes up for having G of them only.

    The interval is for the figure that so many images of the same kind have on average. The bias
    of FID and IS for their number is in that average; what other reference images would change
    is not in the interval. It is too wide rather than too narrow: for two sets that are alike, and
    for classes of exactly equal counts, which vary less than the random groups do.

    Args:
        parts: what is known of each group; `statistic` takes all of them, or all but one.
        count: images in all groups together.
        least: a bound that the figure cannot pass, nor its interval.

    Raises:
        UserError: fewer images than groups.
        ValueError: fewer than two groups.
    """
    from scipy.special import stdtrit

    size = len(parts)
    if size < 2:
        raise ValueError(f"an interval needs 2 groups or more, got {size}")
    if count < size:
        raise UserError(f"got {count} images; an interval over {size} groups needs {size} or more")
    value = statistic(parts)
    without_G = np.array([statistic([*parts[:i], *parts[i + 1 :]]) for i in range(size)])
    error = math.sqrt((size - 1) * float(np.var(without_G)))
    half = float(stdtrit(size - 1, 0.975)) * error
    return Estimate(value, max(least, value - half), value + half, error, count)


def inception_score(groups: Sequence[PredictionStatistics], splits: bool = True) -> Estimate:
    """Inception Score: 1 (all predictions alike) to K (sure ones, of all classes alike).

    It grows with the number of images scored at once: compare equal numbers of images and splits.

    Args:
        groups: random ones, as `Groups` makes.
        splits: the mean of the groups' scores, as is usual with 10 splits. The +- of papers is
            the standard deviation of these, sqrt(G) times the standard error here. False: the
            score of all images together.

    Raises:
        UserError: fewer images than groups.
    """

    def score(parts: Sequence[PredictionStatistics]) -> float:
        if splits:
            return float(np.mean([part.score for part in parts]))
        return PredictionStatistics.merged(parts).score

    return jackknife(groups, score, sum(part.count for part in groups), least=1.0)


@dataclass(frozen=True)
class Difference:
    """One figure minus another, with the 95 % interval of that."""

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def difference(a: Estimate, b: Estimate) -> Difference:
    """By how much two pipelines differ in a figure.

    Covered: that other samples of the same pipelines would give other figures. The samples are
    taken as independent; if equal seeds make them alike, the interval is too wide rather than too
    narrow. Not covered: other trainings of the pipelines, and other reference images. Those they
    share, so most, not all, of the effect of a reference cancels.

    Raises:
        UserError: the figures are of different numbers of images, on which FID and IS depend.
    """
    if a.count != b.count:
        raise UserError(
            f"got figures of {a.count} and of {b.count} images, which cannot be compared\n"
            "score as many of both"
        )
    value = a.value - b.value
    # A bound may have cut the interval below, never above.
    half = math.hypot(a.high - a.value, b.high - b.value)
    return Difference(value, value - half, value + half)
