"""Metrics that compare the features of two sets of images: FID, KID, precision and recall.

Pure functions on features (N, D), float32 or float64, NumPy or torch; computed in float64. sFID is
the Frechet distance of spatial features, the rFID of a tokenizer that of its reconstructions and
their originals.

Shapes: N samples, M reference images, D features, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from ctf.common.errors import UserError
from ctf.evaluation.intervals import GROUPS, Estimate, jackknife
from ctf.evaluation.metrics import as_float64

BLOCK = 2**23  # distances in memory at a time: 64 MB
TIE = 1e-12  # squared distances this close, relative to the largest squared norm, are equal


# --- FID ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (D,) and covariance (D, D) of the features of `count` images (None: unknown).

    Raises:
        UserError: `count` is below 2, the shapes do not fit, or values are not finite.
    """

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None:
            _check_count("FID", self.count, 2)
        mean, covariance = np.shape(self.mean_D), np.shape(self.covariance_DD)
        if len(mean) != 1 or covariance != mean * 2:
            raise UserError(
                f"got a mean of shape {mean} and a covariance of shape {covariance}; "
                "expected (D,) and (D, D)"
            )
        if not (np.isfinite(self.mean_D).all() and np.isfinite(self.covariance_DD).all()):
            raise UserError("the mean or covariance of the features has values that are not finite")

    @property
    def max_rank(self) -> int:
        """Largest possible rank of the covariance: deviations from a mean sum to 0."""
        dim = len(self.mean_D)
        return dim if self.count is None else min(dim, self.count - 1)

    @cached_property
    def root_DR(self) -> np.ndarray:
        """A matrix R with R R^T = covariance."""
        values_D, vectors_DD = np.linalg.eigh(np.asarray(self.covariance_DD, np.float64))
        # Ascending; values beyond the rank, or below 0, are rounding errors.
        values_R, vectors_DR = values_D[-self.max_rank :], vectors_DD[:, -self.max_rank :]
        return np.asarray(vectors_DR * np.sqrt(values_R.clip(min=0)))


class FeatureStatistics:
    """Accumulates mean and covariance of features in float64 and constant memory.

    Sums deviations from the running mean instead of squares, so that a mean that is large compared
    to the spread costs no precision (Chan, Golub, LeVeque, 1979).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean_D = np.zeros(dim)
        self._scatter_DD = np.zeros((dim, dim))  # sum of the outer products of deviations

    def add(self, rows_ND: Tensor | np.ndarray) -> None:
        """Add features (N, D)."""
        rows_ND = as_float64(rows_ND, len(self.mean_D))
        count = len(rows_ND)
        if not count:
            return
        mean_D = rows_ND.mean(axis=0)
        shift_D, total = mean_D - self.mean_D, self.count + count
        # The last row accounts for the difference between the two means.
        shift_1D = np.sqrt(self.count * count / total) * shift_D[None]
        deviations = np.concatenate([rows_ND - mean_D, shift_1D])
        self._scatter_DD += deviations.T @ deviations
        self.mean_D += shift_D * (count / total)
        self.count = total

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Return the statistics of the features of all parts together."""
        merged = cls(len(parts[0].mean_D))
        counts_G = np.array([part.count for part in parts])
        means_GD = np.stack([part.mean_D for part in parts])
        merged.count = int(counts_G.sum())
        merged.mean_D = counts_G @ means_GD / max(1, merged.count)
        shifts_GD = np.sqrt(counts_G)[:, None] * (means_GD - merged.mean_D)
        merged._scatter_DD = shifts_GD.T @ shifts_GD
        for part in parts:
            merged._scatter_DD += part._scatter_DD
        return merged

    @property
    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (over N - 1), as in the reference implementations of FID.

        Raises:
            UserError: fewer than two images were added.
        """
        covariance_DD = self._scatter_DD / max(1, self.count - 1)
        return Gaussian(self.mean_D.copy(), covariance_DD, self.count)


def frechet_distance(samples: Gaussian, reference: Gaussian) -> float:
    """Frechet distance of two Gaussians (arXiv 1706.08500), which is FID for Inception features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S2 = R R^T, the trace of the root is the sum
    of the square roots of the eigenvalues of the symmetric R^T S1 R, which also holds for singular
    covariances. The reference caches R.

    Raises:
        UserError: the numbers of features differ.
    """
    _check_dims(len(samples.mean_D), len(reference.mean_D))
    root_DR = reference.root_DR
    product_RR = root_DR.T @ samples.covariance_DD @ root_DR
    values_R = np.linalg.eigvalsh(product_RR)[-samples.max_rank :].clip(min=0)
    shift_D = samples.mean_D - reference.mean_D
    traces = np.trace(samples.covariance_DD) + np.trace(reference.covariance_DD)
    return max(0.0, float(shift_D @ shift_D + traces - 2 * np.sqrt(values_R).sum()))


def frechet_distance_estimate(groups: Sequence[FeatureStatistics], reference: Gaussian) -> Estimate:
    """`frechet_distance` of all images of the random groups, with a jackknife interval.

    The distance decreases with the number of images: compare only equal numbers.

    Raises:
        UserError: fewer images than groups, or the numbers of features differ.
    """

    def distance(parts: Sequence[FeatureStatistics]) -> float:
        return frechet_distance(FeatureStatistics.merge(parts).gaussian, reference)

    return jackknife(groups, distance, sum(part.count for part in groups), lower_bound=0.0)


# --- KID ------------------------------------------------------------------------------------------


def kernel_distance(
    features_ND: Tensor | np.ndarray,
    reference_MD: Tensor | np.ndarray,
    generator: np.random.Generator,
    groups: int = GROUPS,
) -> Estimate:
    """Kernel distance (KID, arXiv 1801.01401) over all pairs, with a jackknife interval.

    The unbiased squared maximum mean discrepancy, mean_{i != j} k(x_i, x_j) + mean_{i != j}
    k(y_i, y_j) - 2 mean k(x_i, y_j), with k(x, y) = (x.y / D + 1)^3. It can be negative. The cost
    is N (N + M) + M^2 kernel values: pass 10,000 images or so, e.g. a `Reservoir`.

    Args:
        features_ND: features of the samples (N, D).
        reference_MD: features of the reference (M, D).
        generator: assigns the samples to groups.
        groups: number of groups for the interval.

    Raises:
        UserError: fewer images than groups or than 2, or the numbers of features differ.
    """
    samples_ND, others_MD = _as_pair(features_ND, reference_MD)
    count, others = len(samples_ND), len(others_MD)
    _check_count("KID", min(count, others), 2)
    parts = np.array_split(samples_ND[generator.permutation(count)], groups)
    others_parts = np.array_split(others_MD, groups)
    sizes_G = np.array([len(part) for part in parts])
    within_GG = _kernel_sums(parts)
    between_G = np.array([sum(_kernel(a, b).sum() for b in others_parts) for a in parts])
    reference = _kernel_sums(others_parts).sum() / (others * (others - 1))

    def distance(used: Sequence[int]) -> float:
        n = sizes_G[used].sum()
        within = within_GG[np.ix_(used, used)].sum() / (n * (n - 1))
        return float(within + reference - 2 * between_G[used].sum() / (n * others))

    return jackknife(range(groups), distance, count)


def _kernel(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    base_NM = a_ND @ b_MD.T / a_ND.shape[1] + 1
    return np.asarray(base_NM * base_NM * base_NM)  # ** 3 is far slower


def _kernel_sums(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sums (G, G) of the kernel between each two parts, without pairs of an image with itself."""
    sums_GG = np.zeros((len(parts), len(parts)))
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[: i + 1]):
            kernel = _kernel(a, b)
            sums_GG[i, j] = sums_GG[j, i] = kernel.sum() - (kernel.trace() if i == j else 0)
    return sums_GG


# --- Precision, recall, density, coverage ---------------------------------------------------------


@dataclass(frozen=True)
class ManifoldScores:
    """How well two sets of images cover each other; density can exceed 1, the rest is in [0, 1].

    The neighbourhood of an image is the open ball up to its k-th nearest neighbour in its own set.
    """

    precision: float  # fraction of samples inside the neighbourhood of any reference image
    recall: float  # fraction of reference images inside the neighbourhood of any sample
    density: float  # mean number of reference neighbourhoods that contain a sample, over k
    coverage: float  # fraction of reference images whose neighbourhood contains a sample


def manifold_scores(
    features_ND: Tensor | np.ndarray,
    reference_MD: Tensor | np.ndarray,
    k: int = 3,
    density_k: int = 5,
) -> ManifoldScores:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    Density and coverage of a set against itself are 1; an image with more than k copies has an
    empty neighbourhood. All four depend on the numbers of images. Memory beyond the features in
    float64 is bounded.

    Args:
        features_ND: features of the samples (N, D), e.g. a `Reservoir` of 10,000.
        reference_MD: features of the reference (M, D).
        k: of precision and recall; 3 in the paper and in ADM's evaluator.
        density_k: of density and coverage; 5 in the paper.

    Raises:
        UserError: too few images, or the numbers of features differ.
    """
    samples_ND, others_MD = _as_pair(features_ND, reference_MD)
    count, other_count = len(samples_ND), len(others_MD)
    _check_count("recall", count, k + 1)
    _check_count("precision, density and coverage", other_count, max(k, density_k) + 1)
    # Distances are computed from products, which lose precision if the mean is large.
    centre_D = others_MD.mean(axis=0)
    samples_ND = samples_ND - centre_D
    others_MD = others_MD - centre_D
    (radii_N,) = _squared_radii(samples_ND, [k])
    radii_M, density_radii_M = _squared_radii(others_MD, [k, density_k])
    tie = TIE * max(_squared_norms(samples_ND).max(), _squared_norms(others_MD).max())

    precise_N = np.zeros(count, bool)
    recalled = covered = inside = 0
    for rows, squares_BN in _squared_distances(others_MD, samples_ND):
        squares_BN += tie
        precise_N |= (squares_BN < radii_M[rows, None]).any(axis=0)
        recalled += int((squares_BN < radii_N).any(axis=1).sum())
        inside_BN = squares_BN < density_radii_M[rows, None]
        inside += int(inside_BN.sum())
        covered += int(inside_BN.any(axis=1).sum())
    return ManifoldScores(
        precision=float(precise_N.mean()),
        recall=recalled / other_count,
        density=inside / (density_k * count),
        coverage=covered / other_count,
    )


def _squared_radii(rows_ND: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
    """Squared distance of each row to its k-th nearest other row, (N,) for each k."""
    radii = [np.empty(len(rows_ND)) for _ in ks]
    for rows, squares_BN in _squared_distances(rows_ND, rows_ND):
        own_B = np.arange(rows.start, rows.stop)
        squares_BN[own_B - rows.start, own_B] = np.inf
        squares_BN.partition([k - 1 for k in ks], axis=1)
        for radii_N, k in zip(radii, ks, strict=True):
            radii_N[rows] = squares_BN[:, k - 1]
    return radii


def _squared_distances(a_ND: np.ndarray, b_MD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks (B, M) of the squared distances of rows of `a` to all rows of `b`, up to rounding."""
    size = max(1, BLOCK // len(b_MD))
    a_squares_N, b_squares_M = _squared_norms(a_ND), _squared_norms(b_MD)
    for start in range(0, len(a_ND), size):
        rows = slice(start, min(start + size, len(a_ND)))
        squares_BM = a_ND[rows] @ b_MD.T
        squares_BM *= -2
        squares_BM += a_squares_N[rows, None]
        squares_BM += b_squares_M
        yield rows, squares_BM


def _squared_norms(rows_ND: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", rows_ND, rows_ND))


class Reservoir:
    """A uniform random sample of at most `size` rows of a stream of features (algorithm R).

    The result does not depend on the batches. Its order is not random.
    """

    def __init__(self, size: int, dim: int, generator: np.random.Generator) -> None:
        """`generator` must not be used by anything else."""
        self.count = 0  # of the stream
        self._rows = np.empty((size, dim), np.float32)
        self._generator = generator

    def add(self, rows_ND: Tensor | np.ndarray) -> None:
        """Add features (N, D); those in the sample are stored as float32."""
        rows_ND = as_float64(rows_ND, self._rows.shape[1])
        numbers_N = self.count + np.arange(len(rows_ND))
        random_N = self._generator.random(len(rows_ND)) * (numbers_N + 1)
        slots_N = np.where(numbers_N < len(self._rows), numbers_N, random_N.astype(np.int64))
        used_N = slots_N < len(self._rows)
        self._rows[slots_N[used_N]] = rows_ND[used_N]  # the last of equal slots wins
        self.count += len(rows_ND)

    @property
    def rows_ND(self) -> np.ndarray:
        """The sample: float32 (N, D), N at most `size`."""
        return self._rows[: self.count]


def _as_pair(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a_ND, b_MD = as_float64(a), as_float64(b)
    _check_dims(a_ND.shape[1], b_MD.shape[1])
    return a_ND, b_MD


def _check_dims(got: int, expected: int) -> None:
    if got != expected:
        raise UserError(
            f"got {got} features per image, but the reference has {expected}\n"
            "use a reference made with the same features"
        )


def _check_count(metric: str, got: int, required: int) -> None:
    if got < required:
        raise UserError(f"got {got} images, too few for {metric}: each set needs {required}")
