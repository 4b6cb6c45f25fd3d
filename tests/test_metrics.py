"""Metrics: parity with torchmetrics, closed forms, invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from ctf import metrics


def pair(height: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height)
    a = torch.rand(4, 3, height, width, generator=generator) * 2 - 1
    b = a + noise * torch.randn(a.shape, generator=generator)
    return a, b.clamp(-1, 1)


@pytest.mark.parametrize("height, width", [(8, 8), (32, 32), (20, 47)])
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_psnr_and_ssim_equal_torchmetrics(height: int, width: int, noise: float) -> None:
    a, b = pair(height, width, noise)
    a64, b64 = a.double(), b.double()
    psnr = peak_signal_noise_ratio(b64, a64, 2.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(b64, a64, data_range=2.0, reduction="none")
    torch.testing.assert_close(metrics.psnr(a, b), psnr, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics.ssim(a, b), ssim, rtol=1e-6, atol=0)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 12, 12)
    b = torch.stack([a[0] + 0.2, a[1]])
    assert metrics.psnr(a, b).tolist() == pytest.approx([20.0, math.inf])


def test_ssim_of_flat_pictures_is_their_luminance_term() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert float(metrics.ssim(a, b)) == pytest.approx(expected, rel=1e-9)
    assert float(metrics.ssim(a, a)) == pytest.approx(1, abs=1e-12)


def test_each_image_is_scored_alone_and_the_order_of_a_pair_is_free() -> None:
    a, b = pair(24, 24, 0.3)
    for score in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(score(a, b)[2:3], score(a[2:3], b[2:3]), rtol=1e-12, atol=0)
        torch.testing.assert_close(score(a, b), score(b, a), rtol=1e-12, atol=0)


def test_pictures_that_cannot_be_compared() -> None:
    a, b = pair(16, 16, 0.1)
    for score in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=r"\(4, 3, 16, 16\)"):
            score(a, b[:1])
    with pytest.raises(ValueError, match="6 pixels or more, got 5x16"):
        metrics.ssim(a[:, :, :5], b[:, :, :5])


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 1000))
def test_even_codes_have_the_perplexity_of_their_number(used: int, unused: int, n: int) -> None:
    counts_V = torch.tensor([n] * used + [0] * unused)
    assert metrics.perplexity(counts_V) == pytest.approx(used)
    assert metrics.codebook_usage(counts_V) == pytest.approx(used / (used + unused))


def test_perplexity_of_two_codes_is_exp_of_their_entropy() -> None:
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert metrics.perplexity(torch.tensor([9, 1])) == pytest.approx(math.exp(entropy))
    with pytest.raises(ValueError, match="no codes"):
        metrics.perplexity(torch.zeros(4, dtype=torch.int64))


@given(st.integers(1, 2000), st.floats(0, 1))
def test_accuracy_has_the_wilson_interval(count: int, share: float) -> None:
    right = round(share * count)
    wanted_N = np.arange(count) % 7
    predicted_N = np.where(np.arange(count) < right, wanted_N, wanted_N + 1)
    got = metrics.class_accuracy(predicted_N, wanted_N)
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (got.value, got.count) == (pytest.approx(right / count), count)
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= got.low <= got.high <= 1


def test_no_accuracy_without_predictions() -> None:
    with pytest.raises(ValueError):
        metrics.class_accuracy(np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(ValueError):
        metrics.class_accuracy(np.zeros(3, np.int64), np.zeros(2, np.int64))
