"""Figures from arrays: pure functions, float64 inside, no models and no files.

Shapes: B images, H height, W width, V codes, N pictures that were classified.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DATA_RANGE = 2.0  # images are floats in [-1, 1]
WINDOW, SIGMA = 11, 1.5  # of the structural similarity
Z_95 = 1.959963984540054  # the normal distribution has 95 % of its mass within +- this


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
