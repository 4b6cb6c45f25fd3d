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
from torchmetrics.image.inception import InceptionScore

from ctf.common.errors import UserError
from ctf.evaluation import metrics
from ctf.evaluation.intervals import RandomGroups, difference


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


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert float(metrics.ssim(a, b)) == pytest.approx(expected, rel=1e-9)
    assert float(metrics.ssim(a, a)) == pytest.approx(1, abs=1e-12)


def test_psnr_and_ssim_are_symmetric_and_independent_of_the_batch() -> None:
    a, b = pair(24, 24, 0.3)
    for score in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(score(a, b)[2:3], score(a[2:3], b[2:3]), rtol=1e-12, atol=0)
        torch.testing.assert_close(score(a, b), score(b, a), rtol=1e-12, atol=0)


def test_psnr_and_ssim_reject_other_shapes_and_ssim_small_images() -> None:
    a, b = pair(16, 16, 0.1)
    for score in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=r"\(4, 3, 16, 16\)"):
            score(a, b[:1])
    with pytest.raises(ValueError, match="6 pixels or more, got 5x16"):
        metrics.ssim(a[:, :, :5], b[:, :, :5])


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 1000))
def test_perplexity_of_a_uniform_distribution_is_the_number_of_used_codes(
    used: int, unused: int, n: int
) -> None:
    counts_V = torch.tensor([n] * used + [0] * unused)
    assert metrics.perplexity(counts_V) == pytest.approx(used)
    assert metrics.codebook_usage(counts_V) == pytest.approx(used / (used + unused))


def test_perplexity_of_two_codes_is_exp_of_their_entropy() -> None:
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert metrics.perplexity(torch.tensor([9, 1])) == pytest.approx(math.exp(entropy))
    with pytest.raises(ValueError, match="no codes"):
        metrics.perplexity(torch.zeros(4, dtype=torch.int64))


@given(st.integers(1, 2000), st.floats(0, 1))
def test_class_accuracy_has_the_wilson_interval(count: int, share: float) -> None:
    right = round(share * count)
    target_N = np.arange(count) % 7
    predicted_N = np.where(np.arange(count) < right, target_N, target_N + 1)
    got = metrics.class_accuracy(predicted_N, target_N)
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (got.value, got.count) == (pytest.approx(right / count), count)
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= got.low <= got.high <= 1


def test_class_accuracy_needs_predictions() -> None:
    with pytest.raises(ValueError):
        metrics.class_accuracy(np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(ValueError):
        metrics.class_accuracy(np.zeros(3, np.int64), np.zeros(2, np.int64))


class Identity(torch.nn.Module):
    """Takes the place of a network whose outputs are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def statistics_of(logits_NK: np.ndarray) -> metrics.PredictionStatistics:
    statistics = metrics.PredictionStatistics(logits_NK.shape[1])
    statistics.add(logits_NK)
    return statistics


def random_groups(logits_NK: np.ndarray, seed: int = 0) -> list[metrics.PredictionStatistics]:
    groups_N = RandomGroups(np.random.default_rng(seed)).assign(len(logits_NK))
    return [statistics_of(logits_NK[groups_N == group]) for group in range(10)]


def random_logits(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, classes)) * 2


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("splits", [3, 10])
def test_inception_score_over_splits_equals_torchmetrics(splits: int) -> None:
    logits = torch.from_numpy(random_logits(331, 20))
    oracle = InceptionScore(feature=Identity(), splits=splits)
    oracle.update(logits)
    torch.manual_seed(5)
    mean, std = oracle.compute()
    torch.manual_seed(5)
    parts = logits[torch.randperm(331)].chunk(splits)
    got = metrics.inception_score([statistics_of(part.numpy()) for part in parts])
    assert got.value == pytest.approx(float(mean), rel=1e-6)
    assert got.standard_error * splits**0.5 == pytest.approx(float(std), rel=1e-6)
    assert got.count == 331


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_inception_score_of_all_images_equals_torchmetrics() -> None:
    logits = random_logits(200, 50)
    oracle = InceptionScore(feature=Identity(), splits=1)
    oracle.update(torch.from_numpy(logits))
    score = statistics_of(logits).score
    assert score == pytest.approx(float(oracle.compute()[0]), rel=1e-6)
    # A split of 20 images knows less of how the classes are spread than 200 do.
    assert 1 <= metrics.inception_score(random_groups(logits)).value < score


@given(st.integers(1, 12), st.integers(1, 5), st.floats(-1e4, 1e4))
def test_inception_score_of_certain_predictions_is_the_number_of_classes(
    classes: int, each: int, shift: float
) -> None:
    certain = np.tile(np.eye(classes) * 1e5 + shift, (each, 1))
    assert statistics_of(certain).score == pytest.approx(classes)
    assert statistics_of(certain[:1].repeat(9, axis=0)).score == pytest.approx(1)
    assert statistics_of(np.full((7, classes), shift)).score == pytest.approx(1)


def test_log_probabilities_work_as_logits() -> None:
    logits = random_logits(60, 8)
    log_p = torch.from_numpy(logits).log_softmax(dim=1)
    assert statistics_of(log_p).score == pytest.approx(statistics_of(logits + 100).score, rel=1e-12)


def test_inception_score_interval_is_as_wide_as_the_score_varies() -> None:
    estimates = [
        metrics.inception_score(random_groups(random_logits(300, 20, seed), seed))
        for seed in range(200)
    ]
    values = np.array([e.value for e in estimates])
    error = np.mean([e.standard_error**2 for e in estimates]) ** 0.5
    assert error == pytest.approx(values.std(ddof=1), rel=0.15)
    assert 0.92 <= np.mean([e.low <= values.mean() <= e.high for e in estimates]) <= 0.99


def test_scores_of_equal_pipelines_rarely_differ_significantly() -> None:
    scores = [
        metrics.inception_score(random_groups(random_logits(100, 10, seed), seed))
        for seed in range(400)
    ]
    pairs = zip(scores[::2], scores[1::2], strict=True)
    assert np.mean([difference(a, b).significant for a, b in pairs]) <= 0.06


def test_invalid_predictions_are_rejected() -> None:
    with pytest.raises(UserError, match="an image in each split"):
        _ = metrics.PredictionStatistics(5).score
    with pytest.raises(UserError, match="got 4 images; an interval over 10 groups needs 10"):
        metrics.inception_score(
            [statistics_of(random_logits(1, 3)) for _ in range(4)]
            + [metrics.PredictionStatistics(3) for _ in range(6)]
        )
    with pytest.raises(ValueError, match="2 groups or more, got 1"):
        metrics.inception_score([statistics_of(random_logits(9, 3))])
    with pytest.raises(ValueError, match=r"\(4, 6\), expected \(N, 5\)"):
        metrics.PredictionStatistics(5).add(np.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"\(4,\), expected \(N, D\)"):
        metrics.as_float64(np.zeros(4))
    logits = random_logits(4, 5)
    logits[2, 0], logits[3] = math.nan, math.inf
    with pytest.raises(UserError, match="2 of 4 images are not finite"):
        metrics.PredictionStatistics(5).add(logits)
