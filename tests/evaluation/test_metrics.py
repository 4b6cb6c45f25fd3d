"""Metrics: parity with torchmetrics, closed forms, invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, sem, ttest_1samp
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.inception import InceptionScore

from ctf.common.errors import UserError
from ctf.evaluation import distances, metrics


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


class Same(torch.nn.Module):
    """In place of a network: what goes in comes out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def gathered(logits_NK: np.ndarray) -> metrics.PredictionStatistics:
    statistics = metrics.PredictionStatistics(logits_NK.shape[1])
    statistics.add(logits_NK)
    return statistics


def random_logits(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, classes)) * 2


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
@pytest.mark.parametrize("splits", [3, 10])
def test_inception_score_over_splits_equals_torchmetrics(splits: int) -> None:
    logits = torch.from_numpy(random_logits(331, 20))
    oracle = InceptionScore(feature=Same(), splits=splits)
    oracle.update(logits)
    torch.manual_seed(5)
    mean, std = oracle.compute()
    torch.manual_seed(5)
    parts = logits[torch.randperm(331)].chunk(splits)
    got = metrics.inception_score([gathered(part.numpy()) for part in parts])
    assert got.value == pytest.approx(float(mean), rel=1e-6)
    assert got.standard_error * splits**0.5 == pytest.approx(float(std), rel=1e-6)
    assert got.count == 331


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_inception_score_of_all_images_equals_torchmetrics() -> None:
    logits = random_logits(200, 50)
    oracle = InceptionScore(feature=Same(), splits=1)
    oracle.update(torch.from_numpy(logits))
    groups = metrics.Groups(lambda: metrics.PredictionStatistics(50), np.random.default_rng(0))
    groups.add(logits)
    got = metrics.inception_score(groups.parts, splits=False)
    assert got.value == pytest.approx(float(oracle.compute()[0]), rel=1e-6)
    assert groups.merged().score == pytest.approx(got.value, rel=1e-12)
    # A split of 20 images knows less of how the classes are spread than 200 do.
    assert 1 <= metrics.inception_score(groups.parts).value < got.value


@given(st.integers(1, 12), st.integers(1, 5), st.floats(-1e4, 1e4))
def test_inception_score_of_sure_predictions_is_the_number_of_classes(
    classes: int, each: int, shift: float
) -> None:
    sure = np.tile(np.eye(classes) * 1e5 + shift, (each, 1))
    assert gathered(sure).score == pytest.approx(classes)
    assert gathered(sure[:1].repeat(9, axis=0)).score == pytest.approx(1)
    assert gathered(np.full((7, classes), shift)).score == pytest.approx(1)


def test_log_probabilities_are_logits() -> None:
    logits = random_logits(60, 8)
    log_p = torch.from_numpy(logits).log_softmax(dim=1)
    assert gathered(log_p).score == pytest.approx(gathered(logits + 100).score, rel=1e-12)


@given(st.integers(0, 60), st.lists(st.integers(0, 17), max_size=8), st.integers(2, 7))
def test_groups_do_not_depend_on_the_batches(count: int, batches: list[int], size: int) -> None:
    rows = random_logits(count, 3)

    def make() -> metrics.Groups[metrics.PredictionStatistics]:
        new = metrics.PredictionStatistics
        return metrics.Groups(lambda: new(3), np.random.default_rng(1), size)

    whole, cut = make(), make()
    whole.add(rows)
    for batch in np.split(rows, np.minimum(np.cumsum(batches, dtype=int), count)):
        cut.add(batch)
    counts = [part.count for part in whole.parts]
    assert sum(counts) == count and max(counts) - min(counts) <= 1
    for a, b in zip(whole.parts, cut.parts, strict=True):
        assert a.count == b.count
        if a.count:
            assert a.score == pytest.approx(b.score, rel=1e-12)


def test_groups_mix_classes_that_come_in_turn() -> None:
    """Image i is of class i % 10, and there are 10 groups."""
    groups = metrics.Groups(lambda: distances.FeatureStatistics(10), np.random.default_rng(0))
    groups.add(np.eye(10)[np.arange(2000) % 10])
    shares = np.stack([part.mean_D for part in groups.parts])
    # 200 draws of a tenth: 0.1 +- 0.02
    assert shares.min() > 0.03 and shares.max() < 0.2
    assert shares.std() == pytest.approx(0.02, rel=0.25)


@given(st.integers(2, 12), st.integers(1, 9))
def test_jackknife_of_a_mean_is_students_interval_of_the_groups(size: int, each: int) -> None:
    values = np.random.default_rng(size).normal(3, 2, size)
    got = metrics.jackknife(values, lambda kept: float(np.mean(kept)), size * each)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert got.value == pytest.approx(values.mean())
    assert got.standard_error == pytest.approx(sem(values))
    assert (got.low, got.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert got.count == size * each


@pytest.mark.parametrize("splits", [False, True])
def test_interval_of_the_inception_score_is_as_wide_as_the_score_varies(splits: bool) -> None:
    estimates = []
    for seed in range(200):
        make = metrics.Groups(lambda: metrics.PredictionStatistics(20), np.random.default_rng(seed))
        make.add(random_logits(300, 20, seed))
        estimates.append(metrics.inception_score(make.parts, splits))
    values = np.array([e.value for e in estimates])
    error = np.mean([e.standard_error**2 for e in estimates]) ** 0.5
    assert error == pytest.approx(values.std(ddof=1), rel=0.15)
    assert 0.92 <= np.mean([e.low <= values.mean() <= e.high for e in estimates]) <= 0.99


def test_the_interval_does_not_pass_the_bound() -> None:
    got = metrics.jackknife([0.0, 5.0, 1.0], lambda kept: float(np.mean(kept)), 9, least=0.5)
    assert got.low == 0.5 and got.value == pytest.approx(2) and got.high > 5


def test_difference_of_two_estimates() -> None:
    a, b = (metrics.Estimate(v, v - 3, v + h, 1.0, 100) for v, h in ((10.0, 3), (4.0, 4)))
    got = metrics.difference(a, b)
    assert got == metrics.Difference(6, pytest.approx(1), pytest.approx(11))
    assert got.significant and metrics.difference(b, a).significant
    closer = metrics.Estimate(5.5, 2.5, 8.5, 1.0, 100)
    assert not metrics.difference(a, metrics.Estimate(6.5, 3, 10.5, 1.0, 100)).significant
    assert metrics.difference(a, closer).significant  # 4.5 against 4.24
    with pytest.raises(UserError, match="of 100 and of 50 images"):
        metrics.difference(a, metrics.Estimate(4, 1, 7, 1.0, 50))


def test_equal_pipelines_rarely_differ() -> None:
    def score(seed: int) -> metrics.Estimate:
        make = metrics.Groups(lambda: metrics.PredictionStatistics(10), np.random.default_rng(seed))
        make.add(random_logits(100, 10, seed))
        return metrics.inception_score(make.parts)

    pairs = [metrics.difference(score(2 * i), score(2 * i + 1)) for i in range(200)]
    assert np.mean([pair.significant for pair in pairs]) <= 0.06


def test_predictions_that_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="an image in each split"):
        _ = metrics.PredictionStatistics(5).score
    with pytest.raises(UserError, match="got 4 images; an interval over 10 groups needs 10"):
        metrics.inception_score(
            [gathered(random_logits(1, 3)) for _ in range(4)]
            + [metrics.PredictionStatistics(3) for _ in range(6)]
        )
    with pytest.raises(ValueError, match="2 groups or more, got 1"):
        metrics.inception_score([gathered(random_logits(9, 3))])
    with pytest.raises(ValueError, match=r"\(4, 6\), expected \(N, 5\)"):
        metrics.PredictionStatistics(5).add(np.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"\(4,\), expected \(N, D\)"):
        metrics.as_rows(np.zeros(4))
    logits = random_logits(4, 5)
    logits[2, 0], logits[3] = math.nan, math.inf
    with pytest.raises(UserError, match="2 of 4 images are not finite"):
        metrics.PredictionStatistics(5).add(logits)
