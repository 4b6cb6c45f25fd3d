"""Metrics of images, codes and predictions: pure functions, computed in float64.

`distances` has the metrics that compare the features of two sets of images, `intervals` the
estimates with intervals.

Shapes: B images of a batch, C channels, H height, W width, V codes, N images, K classes, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctf.common.errors import UserError
from ctf.evaluation.intervals import Estimate, jackknife

DATA_RANGE = 2.0  # images are in [-1, 1]
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
Z_95 = 1.959963984540054  # 95 % of a normal distribution lies within +- this many deviations


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: 10 log10(range^2 / MSE) of each pair of images.

    Args:
        a_BCHW: images (B, 3, H, W) in [-1, 1].
        b_BCHW: images of the same shape.

    Returns:
        (B,) float64, infinite for equal images.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair(a_BCHW, b_BCHW)
    error_B = (a_BCHW.double() - b_BCHW.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / error_B)


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al., 2004), the mean over all pixels.

    (2 ma mb + c1) (2 cov + c2) / ((ma^2 + mb^2 + c1) (va + vb + c2)) with means, variances and
    covariance in a Gaussian window of 11 pixels and sigma 1.5, c1 = (0.01 range)^2 and
    c2 = (0.03 range)^2. Borders are padded by reflection, as in torchmetrics; scikit-image crops
    them instead, and its values differ slightly.

    Args:
        a_BCHW: images (B, 3, H, W) in [-1, 1], H and W at least 6.
        b_BCHW: images of the same shape.

    Returns:
        (B,) float64 in [-1, 1], 1 for equal images.

    Raises:
        ValueError: the shapes differ, or the images are smaller.
    """
    _check_pair(a_BCHW, b_BCHW)
    height, width = a_BCHW.shape[2:]
    if min(height, width) <= SSIM_WINDOW // 2:
        raise ValueError(f"SSIM needs {SSIM_WINDOW // 2 + 1} pixels or more, got {height}x{width}")
    a, b = a_BCHW.double(), b_BCHW.double()
    rows, columns = _gaussian_blur_matrix(height).to(a), _gaussian_blur_matrix(width).to(a).T

    def blur(x: Tensor) -> Tensor:
        return rows @ x @ columns

    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_blur_matrix(size: int) -> Tensor:
    """A (size, size) matrix whose row i holds the window's weights around pixel i."""
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offsets.double() / SSIM_SIGMA) ** 2)
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
    """Fraction of the V codes that occur at least once, given the count of each: 0 to 1."""
    return float((counts_V > 0).double().mean())


def perplexity(counts_V: Tensor) -> float:
    """Perplexity of the code distribution, exp(-sum p log p): 1 (one code) to V (uniform).

    Raises:
        ValueError: all counts are 0.
    """
    total = counts_V.double().sum()
    if not total > 0:
        raise ValueError("perplexity of no codes: every count is 0")
    return float(torch.special.entr(counts_V.double() / total).sum().exp())


@dataclass(frozen=True)
class Accuracy:
    """A fraction of correct predictions out of `count`, with its 95 % interval, in [0, 1]."""

    value: float
    low: float
    high: float
    count: int


def class_accuracy(predicted_N: np.ndarray, target_N: np.ndarray) -> Accuracy:
    """Fraction of predicted classes that equal the targets, with the Wilson score interval.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) (Wilson, 1927): it stays
    in [0, 1] and does not vanish where all predictions are correct.

    Raises:
        ValueError: there are no predictions, or their number differs from that of the targets.
    """
    if predicted_N.shape != target_N.shape or predicted_N.size == 0:
        raise ValueError(f"got {predicted_N.shape} predictions for {target_N.shape} classes")
    count = predicted_N.size
    p, z2 = float(np.mean(predicted_N == target_N)), Z_95**2 / count
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    # At p = 0 and 1 the bounds are 0 and 1 up to rounding.
    return Accuracy(p, max(0.0, centre - half), min(1.0, centre + half), count)


class PredictionStatistics:
    """Accumulates class predictions for the Inception Score."""

    def __init__(self, classes: int) -> None:
        self.count = 0
        self._probabilities_K = np.zeros(classes)  # summed over images
        self._negative_entropy = 0.0  # sum of p log p over images and classes

    def add(self, logits_NK: Tensor | np.ndarray) -> None:
        """Add logits or log-probabilities (N, K)."""
        logits = torch.from_numpy(as_float64(logits_NK, len(self._probabilities_K)).copy())
        log_p_NK = logits.log_softmax(dim=1)
        p_NK = log_p_NK.exp()
        self.count += len(p_NK)
        self._probabilities_K += p_NK.sum(dim=0).numpy()
        self._negative_entropy += float((p_NK * log_p_NK).sum())

    @property
    def score(self) -> float:
        """Inception Score (arXiv 1606.03498): exp(mean_x KL(p(y|x) || p(y))), from 1 to K.

        Raises:
            UserError: nothing was added.
        """
        if not self.count:
            raise UserError("the Inception Score needs an image in each split: score more images")
        mean_K = torch.from_numpy(self._probabilities_K / self.count)
        entropy = float(torch.special.entr(mean_K).sum())
        return math.exp(max(0.0, self._negative_entropy / self.count + entropy))


def inception_score(groups: Sequence[PredictionStatistics]) -> Estimate:
    """Mean Inception Score of random groups: 1 (equal predictions) to K (certain, all classes).

    It grows with the number of images in a group: compare only equal numbers of images and groups.
    The standard deviation over splits that papers report is sqrt(G) times this standard error.

    Raises:
        UserError: fewer images than groups.
    """

    def mean_score(parts: Sequence[PredictionStatistics]) -> float:
        return float(np.mean([part.score for part in parts]))

    return jackknife(groups, mean_score, sum(part.count for part in groups), lower_bound=1.0)


def as_float64(rows_ND: Tensor | np.ndarray, dim: int | None = None) -> np.ndarray:
    """Convert the outputs of a network for N images to a finite float64 array (N, D).

    Raises:
        ValueError: it does not have two axes, or not `dim` columns.
        UserError: some values are not finite.
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
