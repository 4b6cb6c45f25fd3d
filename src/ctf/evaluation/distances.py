"""How far two sets of pictures are apart, by the features that a network finds in them.

Pure functions on arrays, float64 inside, no models and no files. Features are (N, D), float32 or
float64, NumPy or torch. FID and sFID are the same function of different features, and so is the
rFID of a tokenizer: reconstructions against originals.

Shapes: N sampled pictures, M reference pictures, D features, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from ctf.common.errors import UserError
from ctf.evaluation.metrics import GROUPS, Estimate, as_rows, jackknife

BLOCK = 2**23  # distances held at once: 64 MB
TIE = 1e-12  # squared distances closer than this, of the largest squared norm, are equal


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (D,) and covariance (D, D) of the features of `count` pictures, None: not known.

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
    def rank(self) -> int:
        """The largest that the covariance can have: deviations from a mean add up to 0."""
        dim = len(self.mean_D)
        return dim if self.count is None else min(dim, self.count - 1)

    @cached_property
    def root_DR(self) -> np.ndarray:
        """A matrix whose product with its transpose is the covariance."""
        values_D, vectors_DD = np.linalg.eigh(np.asarray(self.covariance_DD, np.float64))
        # Ascending; what lies below the rank, or below 0, is rounding.
        values_R, vectors_DR = values_D[-self.rank :], vectors_DD[:, -self.rank :]
        return np.asarray(vectors_DR * np.sqrt(values_R.clip(min=0)))


class FeatureStatistics:
    """Mean and covariance of a stream of features in float64 and constant memory.

    It keeps deviations from the running mean, not sums of squares, so a mean that is large
    against the spread costs no digits (Chan, Golub, LeVeque, 1979).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean_D = np.zeros(dim)
        self._scatter_DD = np.zeros((dim, dim))  # sum of the products of deviations

    def add(self, rows_ND: Tensor | np.ndarray) -> None:
        """Args: features (N, D)."""
        rows_ND = as_rows(rows_ND, len(self.mean_D))
        count = len(rows_ND)
        if not count:
            return
        mean_D = rows_ND.mean(axis=0)
        shift_D, total = mean_D - self.mean_D, self.count + count
        # The last row adds what the difference of the two means is worth.
        shift_1D = np.sqrt(self.count * count / total) * shift_D[None]
        deviations = np.concatenate([rows_ND - mean_D, shift_1D])
        self._scatter_DD += deviations.T @ deviations
        self.mean_D += shift_D * (count / total)
        self.count = total

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """The statistics of all the features of the parts."""
        out = cls(len(parts[0].mean_D))
        counts_G = np.array([part.count for part in parts])
        means_GD = np.stack([part.mean_D for part in parts])
        out.count = int(counts_G.sum())
        out.mean_D = counts_G @ means_GD / max(1, out.count)
        shifts_GD = np.sqrt(counts_G)[:, None] * (means_GD - out.mean_D)
        out._scatter_DD = shifts_GD.T @ shifts_GD
        for part in parts:
            out._scatter_DD += part._scatter_DD
        return out

    @property
    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance, over N - 1, as the reference implementations of FID.

        Raises:
            UserError: fewer than two pictures were added.
        """
        covariance_DD = self._scatter_DD / max(1, self.count - 1)
        return Gaussian(self.mean_D.copy(), covariance_DD, self.count)


class Reservoir:
    """A random sample of at most `size` of a stream of features, each as likely as any other.

    What it keeps does not depend on the batches (Vitter's algorithm R). The order is not random.
    """

    def __init__(self, size: int, dim: int, generator: np.random.Generator) -> None:
        """Args: generator: used by nothing else."""
        self.count = 0  # of the stream
        self._rows = np.empty((size, dim), np.float32)
        self._generator = generator

    def add(self, rows_ND: Tensor | np.ndarray) -> None:
        """Args: features (N, D); they are kept as float32."""
        rows_ND = as_rows(rows_ND, self._rows.shape[1])
        numbers_N = self.count + np.arange(len(rows_ND))
        drawn_N = self._generator.random(len(rows_ND)) * (numbers_N + 1)
        places_N = np.where(numbers_N < len(self._rows), numbers_N, drawn_N.astype(np.int64))
        kept_N = places_N < len(self._rows)
        self._rows[places_N[kept_N]] = rows_ND[kept_N]  # the last of several stays
        self.count += len(rows_ND)

    @property
    def rows_ND(self) -> np.ndarray:
        """float32 (N, D), N at most `size`."""
        return self._rows[: self.count]


def frechet_distance(a: Gaussian, reference: Gaussian) -> float:
    """Frechet distance of two Gaussians (Heusel et al., 2017): FID for Inception's features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S2 = R R^T the last term is the sum of the
    roots of the eigenvalues of the symmetric R^T S1 R, none below 0 and at most as many as the
    ranks allow, so it holds for singular covariances. The root R is kept with the reference.

    Raises:
        UserError: the numbers of features differ.
    """
    _check_dims(len(a.mean_D), len(reference.mean_D))
    root_DR = reference.root_DR
    product_RR = root_DR.T @ a.covariance_DD @ root_DR
    values_R = np.linalg.eigvalsh(product_RR)[-a.rank :].clip(min=0)
    shift_D = a.mean_D - reference.mean_D
    traces = np.trace(a.covariance_DD) + np.trace(reference.covariance_DD)
    return max(0.0, float(shift_D @ shift_D + traces - 2 * np.sqrt(values_R).sum()))


def frechet_distance_estimate(groups: Sequence[FeatureStatistics], reference: Gaussian) -> Estimate:
    """`frechet_distance` of all pictures, with an interval by leaving out each group in turn.

    The distance shrinks as pictures are added, to that of infinitely many: compare equal numbers
    only. The interval is for that number of pictures and this reference.

    Args: groups: random ones, as `metrics.Groups` makes.

    Raises:
        UserError: fewer images than groups, or the numbers of features differ.
    """

    def distance(parts: Sequence[FeatureStatistics]) -> float:
        return frechet_distance(FeatureStatistics.merged(parts).gaussian, reference)

    return jackknife(groups, distance, sum(part.count for part in groups), least=0.0)


def kernel_distance(
    features_ND: Tensor | np.ndarray,
    reference_MD: Tensor | np.ndarray,
    generator: np.random.Generator,
    groups: int = GROUPS,
) -> Estimate:
    """Kernel distance (KID, Binkowski et al., 2018) over all pairs, with an interval.

    The unbiased squared maximum mean discrepancy for the kernel (x.y / D + 1)^3, which may come
    out below 0. It needs N (N + M) + M^2 kernel values, so give it 10,000 pictures or so: a
    `Reservoir` of more. The interval is by the jackknife over random groups of the N pictures.

    Raises:
        UserError: fewer images than groups or than 2, or the numbers of features differ.
    """
    samples_ND, others_MD = _pair(features_ND, reference_MD)
    count, others = len(samples_ND), len(others_MD)
    _check_count("KID", min(count, others), 2)
    parts = np.array_split(samples_ND[generator.permutation(count)], groups)
    others_parts = np.array_split(others_MD, groups)
    sizes_G = np.array([len(part) for part in parts])
    within_GG = _kernel_sums(parts)
    between_G = np.array([sum(_kernel(a, b).sum() for b in others_parts) for a in parts])
    reference = _kernel_sums(others_parts).sum() / (others * (others - 1))

    def distance(kept: Sequence[int]) -> float:
        n = sizes_G[kept].sum()
        own = within_GG[np.ix_(kept, kept)].sum() / (n * (n - 1))
        return float(own + reference - 2 * between_G[kept].sum() / (n * others))

    return jackknife(range(groups), distance, count)


def kernel_distance_of_subsets(
    features_ND: Tensor | np.ndarray,
    reference_MD: Tensor | np.ndarray,
    generator: np.random.Generator,
    subsets: int = 100,
    size: int = 1000,
) -> tuple[float, float]:
    """KID as it is published: mean and standard deviation over random subsets of both sets.

    The mean approximates `kernel_distance`. The deviation is that of a single subset: it depends
    on `size` alone and says little about the error of the mean.

    Raises:
        UserError: fewer images than `size`, or the numbers of features differ.
    """
    sets = _pair(features_ND, reference_MD)
    _check_count(f"KID over subsets of {size}", min(map(len, sets)), size)

    def distance() -> float:
        a, b = (rows[generator.permutation(len(rows))[:size]] for rows in sets)
        own = _kernel_sums([a]).sum() + _kernel_sums([b]).sum()
        return float(own / (size * (size - 1)) - 2 * _kernel(a, b).mean())

    values = [distance() for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def _kernel(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    base_NM = a_ND @ b_MD.T / a_ND.shape[1] + 1
    return base_NM * base_NM * base_NM  # ** 3 is far slower


def _kernel_sums(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sum of the kernel between each two parts (G, G), without that of a picture with itself."""
    sums_GG = np.zeros((len(parts), len(parts)))
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[: i + 1]):
            kernel = _kernel(a, b)
            sums_GG[i, j] = sums_GG[j, i] = kernel.sum() - (kernel.trace() if i == j else 0)
    return sums_GG


@dataclass(frozen=True)
class ManifoldScores:
    """How two sets of pictures cover each other; density may pass 1, the others are in 0 to 1."""

    precision: float  # fraction of the samples that lie among the reference pictures
    recall: float  # fraction of the reference pictures that lie among the samples
    density: float  # how many neighbourhoods of reference pictures a sample is in, over k
    coverage: float  # fraction of the reference pictures with a sample among their neighbours


def manifold_scores(
    features_ND: Tensor | np.ndarray,
    reference_MD: Tensor | np.ndarray,
    k: int = 3,
    density_k: int = 5,
) -> ManifoldScores:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    A picture's neighbourhood is the open ball up to its k-th nearest other one of its own set.
    So a set has density and coverage 1 against itself, and a picture of which there are more than
    k copies has an empty one. All four depend on the numbers of pictures. Takes a `Reservoir` of
    10,000 or so; memory beyond the features in float64 is bounded.

    Args:
        k: of precision and recall: 3 in the paper and in ADM's evaluator.
        density_k: of density and coverage: 5 in the paper.

    Raises:
        UserError: too few images, or the numbers of features differ.
    """
    samples_ND, others_MD = _pair(features_ND, reference_MD)
    count, other_count = len(samples_ND), len(others_MD)
    _check_count("recall", count, k + 1)
    _check_count("precision, density and coverage", other_count, max(k, density_k) + 1)
    # Distances come from products, which lose digits if the mean is large.
    centre_D = others_MD.mean(axis=0)
    samples_ND = samples_ND - centre_D
    others_MD = others_MD - centre_D
    (radii_N,) = _radii(samples_ND, [k])
    radii_M, density_radii_M = _radii(others_MD, [k, density_k])
    tie = TIE * max(_squares(samples_ND).max(), _squares(others_MD).max())

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


def _radii(rows_ND: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
    """Squared distance of each row to its k-th nearest other one (N,), for each k."""
    radii = [np.empty(len(rows_ND)) for _ in ks]
    for rows, squares_BN in _squared_distances(rows_ND, rows_ND):
        own_B = np.arange(rows.start, rows.stop)
        squares_BN[own_B - rows.start, own_B] = np.inf
        squares_BN.partition([k - 1 for k in ks], axis=1)
        for radii_N, k in zip(radii, ks, strict=True):
            radii_N[rows] = squares_BN[:, k - 1]
    return radii


def _squared_distances(a_ND: np.ndarray, b_MD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks (B, M) of the squared distances from rows of `a` to all of `b`; rounding included."""
    size = max(1, BLOCK // len(b_MD))
    a_squares_N, b_squares_M = _squares(a_ND), _squares(b_MD)
    for start in range(0, len(a_ND), size):
        rows = slice(start, min(start + size, len(a_ND)))
        squares_BM = a_ND[rows] @ b_MD.T
        squares_BM *= -2
        squares_BM += a_squares_N[rows, None]
        squares_BM += b_squares_M
        yield rows, squares_BM


def _squares(rows_ND: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", rows_ND, rows_ND))


def _pair(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a_ND, b_MD = as_rows(a), as_rows(b)
    _check_dims(a_ND.shape[1], b_MD.shape[1])
    return a_ND, b_MD


def _check_dims(got: int, expected: int) -> None:
    if got != expected:
        raise UserError(
            f"got {got} features of an image, and {expected} in the reference\n"
            "use a reference that was made with the same features"
        )


def _check_count(what: str, got: int, needed: int) -> None:
    if got < needed:
        raise UserError(f"got {got} images, too few for {what}: each set needs {needed} or more")
