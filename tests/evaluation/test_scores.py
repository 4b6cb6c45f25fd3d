"""Scores of images against a reference: closed forms, a required order, and the cache."""

import dataclasses
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ctf.common.errors import UserError
from ctf.data.image_set import Splits
from ctf.data.images import open_images
from ctf.evaluation import npz_files, scores
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance, manifold_scores
from ctf.evaluation.extractors import Extractor, Features, open_extractor
from ctf.evaluation.image_collection import ImageCollection, StoredStatistics
from ctf.evaluation.intervals import Estimate
from ctf.evaluation.reference_sets import from_image_sets, open_reference
from ctf.evaluation.scores import (
    FeatureSummary,
    Reference,
    check_statistics,
    compute_scores,
    load_reference,
    reconstruction_fid,
    summarize,
)
from ctf.pipelines.pipeline import Pipeline
from tests.evaluation.helpers import Pixels, collection, colour_extractor, noise

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def value(score: Estimate | float) -> float:
    return score.value if isinstance(score, Estimate) else score


def scores_of(
    samples: ImageCollection, reference: ImageCollection | StoredStatistics, extractor: Extractor
) -> dict[str, float]:
    known = load_reference(reference, extractor)
    scores_ = compute_scores(summarize(extractor, samples), known, extractor.suffix)
    return {name.removesuffix(extractor.suffix): value(score) for name, score in scores_.items()}


class Counted:
    """Counts the images that an extractor is applied to."""

    def __init__(self, extractor: Extractor) -> None:
        self.count = 0
        self.extractor = dataclasses.replace(extractor, network=self.network)
        self.inner = extractor.network

    def network(self, images: Pixels) -> Features:
        self.count += len(images)
        return self.inner(images)


# --- summaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_summary_equals_statistics_of_all_features_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "CHUNK", chunk)
    pixels, classes_N = noise(120, 0), np.arange(120) % 3
    classes_N[classes_N == 1] = 2  # b has no images
    calls: list[tuple[int, int]] = []
    summary = summarize(
        colour_extractor(), collection(pixels, classes_N, NAMES), lambda *args: calls.append(args)
    )
    features = colour_extractor()(pixels)
    pooled_ND = features.pooled_ND.double().numpy()
    gaussian = summary.gaussian
    np.testing.assert_allclose(gaussian.mean_D, pooled_ND.mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance_DD, np.cov(pooled_ND, rowvar=False), rtol=1e-9)
    assert [group.count for group in summary.groups] == [12] * 10
    assert summary.spatial is not None and summary.spatial.count == 120
    assert summary.predictions is not None
    assert [group.count for group in summary.predictions] == [12] * 10
    assert np.array_equal(summary.rows.rows_ND, features.pooled_ND.numpy())
    means_CD = summary.class_means_CD
    assert means_CD is not None and np.isnan(means_CD[1]).all()
    for number in (0, 2):
        of_class = pooled_ND[classes_N == number]
        np.testing.assert_allclose(means_CD[number], of_class.mean(0), rtol=1e-12)
    assert calls == [*((n, 120) for n in range(7, 120, 7)), (120, 120)]


@pytest.mark.parametrize(("classes", "names"), [(None, None), (np.zeros(20, int), None)])
def test_class_means_need_class_names(classes: Any, names: Any) -> None:
    assert (
        summarize(colour_extractor(), collection(noise(20, 0), classes, names)).class_means_CD
        is None
    )


# --- closed forms and orders ----------------------------------------------------------------------


def test_images_against_themselves_have_perfect_scores() -> None:
    images = collection(noise(200, 1))
    found = scores_of(images, images, colour_extractor())
    assert list(found) == [
        "FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage"
    ]  # fmt: skip
    assert found["FID"] == pytest.approx(0, abs=1e-9)
    assert found["sFID"] == pytest.approx(0, abs=1e-9)
    assert [found[n] for n in ("precision", "recall", "density", "coverage")] == [1, 1, 1, 1]
    assert found["KID"] < 0  # unbiased: 0 on average for two samples of one distribution


def test_fid_of_a_shift_is_its_square() -> None:
    """Brighter by 30: each of three means moves by 3, no deviation does."""
    pixels = noise(300, 2) // 2
    found = scores_of(collection(pixels + 30), collection(pixels), colour_extractor())
    assert found["FID"] == pytest.approx(3 * 3**2, rel=1e-6)


def test_inception_score_of_certain_predictions_of_three_classes() -> None:
    pixels = np.zeros((300, 4, 4, 3), np.uint8)
    pixels[np.arange(300), ..., np.arange(300) % 3] = 255  # red, green, blue in turn
    # Random groups of 30 have some colours more often than others, so it is not quite 3.
    found = scores_of(collection(pixels), collection(noise(50, 3)), colour_extractor())
    assert 2.7 < found["IS"] < 3


def test_better_images_have_better_scores() -> None:
    """Real pictures, the same blurred, and noise, against other real ones of Fashion-MNIST."""
    images = open_images("fashion-mnist").val
    real, others = images.read(np.arange(600)), images.read(np.arange(600, 1200))
    blur = ImageFilter.GaussianBlur(2)
    blurred = np.stack([np.asarray(Image.fromarray(p).filter(blur)) for p in real])
    extractor = open_extractor("fashion")
    found = [
        scores_of(collection(pixels), collection(others), extractor)
        for pixels in (real, blurred, noise(600, 4, 32))
    ]
    for name, sign in (("FID", 1), ("KID", 1), ("precision", -1), ("recall", -1), ("coverage", -1)):
        best, middle, worst = (sign * one[name] for one in found)
        assert best < middle <= worst, name
    assert found[0]["FID"] < 0.2 * found[1]["FID"]


def test_fid_is_and_kid_have_intervals() -> None:
    images = collection(noise(40, 5))
    known = load_reference(images, colour_extractor())
    scores_ = compute_scores(summarize(colour_extractor(), images), known, "-x")
    assert {n for n, s in scores_.items() if isinstance(s, Estimate)} == {"FID-x", "IS-x", "KID-x"}


def test_inception_score_needs_logits() -> None:
    images = collection(noise(40, 5))
    assert "IS" not in scores_of(images, images, colour_extractor(with_logits=False))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="got 9 images; an interval over 10 groups needs 10"):
        scores_of(collection(noise(9, 0)), collection(noise(40, 1)), colour_extractor())


# --- statistics as a reference --------------------------------------------------------------------


def statistics(summary: FeatureSummary, features: str | None) -> StoredStatistics:
    spatial = None if summary.spatial is None else summary.spatial.gaussian
    return StoredStatistics("s.npz", "f", summary.gaussian, spatial, features)


def test_stored_statistics_give_the_same_distances(tmp_path: Path) -> None:
    """And no scores that need the images themselves."""
    samples, reference, extractor = (
        collection(noise(60, 0)),
        collection(noise(80, 1) // 2),
        colour_extractor(),
    )
    with_images = scores_of(samples, reference, extractor)
    found = statistics(summarize(extractor, reference), extractor.digest)
    path = tmp_path / "s.npz"
    npz_files.save_statistics(path, found.pooled, found.spatial, extractor.digest)
    stored = scores_of(samples, open_reference(str(path), 8), extractor)
    assert list(stored) == ["FID", "sFID", "IS"]
    for name, score in stored.items():
        assert score == pytest.approx(with_images[name], rel=1e-9)


def test_statistics_of_other_features_are_refused() -> None:
    stored = statistics(summarize(colour_extractor(), collection(noise(60, 0))), "c")
    check_statistics(stored, colour_extractor(), 8)
    with pytest.raises(UserError, match=r"s\.npz: made with other features than colours"):
        check_statistics(stored, colour_extractor(digest="another"), 8)
    unknown = dataclasses.replace(stored, features=None)
    check_statistics(unknown, colour_extractor(digest="another"), 8)
    with pytest.raises(UserError, match=r"s\.npz: statistics of 6 features, but fashion has 128"):
        check_statistics(unknown, open_extractor("fashion"), 8)
    spatial = dataclasses.replace(unknown, spatial=Gaussian(np.zeros(5), np.eye(5)))
    with pytest.raises(UserError, match=r"statistics of 5 features, but colours has 3"):
        check_statistics(spatial, colour_extractor(), 8)


def test_adm_reference_batches_use_their_statistics_for_inception() -> None:
    """FID and sFID are against the statistics of the whole set, all else against its images."""
    whole = collection(noise(400, 0) // 2)
    part = collection(noise(400, 0)[:50] // 2)
    samples, inception = collection(noise(60, 1)), colour_extractor("inception")
    batch = dataclasses.replace(part, statistics=statistics(summarize(inception, whole), None))
    against_whole, against_part = (scores_of(samples, one, inception) for one in (whole, part))
    found = scores_of(samples, batch, inception)
    for name in ("FID", "sFID"):
        assert found[name] == pytest.approx(against_whole[name], rel=1e-9)
        assert found[name] != pytest.approx(against_part[name], rel=1e-3)
    for name in ("KID", "precision", "recall", "density", "coverage"):
        assert found[name] == against_part[name]
    assert scores_of(samples, batch, colour_extractor()) == scores_of(
        samples, part, colour_extractor()
    )


# --- the cache ------------------------------------------------------------------------------------


def assert_equal(a: Reference, b: Reference) -> None:
    assert np.array_equal(a.pooled.covariance_DD, b.pooled.covariance_DD)
    assert a.rows_MD is not None and b.rows_MD is not None
    assert np.array_equal(a.rows_MD, b.rows_MD)
    assert a.class_means_CD is not None and b.class_means_CD is not None
    assert np.array_equal(a.class_means_CD, b.class_means_CD, equal_nan=True)
    assert a.class_names == b.class_names == NAMES


@pytest.fixture
def reference() -> ImageCollection:
    return collection(noise(60, 0), np.arange(60) % 2, NAMES)


def test_features_of_a_reference_are_computed_once(reference: ImageCollection, cache: Path) -> None:
    counted = Counted(colour_extractor())
    first = load_reference(reference, counted.extractor)
    assert counted.count == 60 and len(list(cache.iterdir())) == 1
    calls: list[Any] = []
    again = load_reference(reference, counted.extractor, lambda *args: calls.append(args))
    assert counted.count == 60 and calls == []
    assert_equal(first, again)
    load_reference(reference, dataclasses.replace(counted.extractor, digest="other"))
    load_reference(collection(noise(30, 1)), counted.extractor)
    assert counted.count == 150 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_cache_file_is_replaced(
    reference: ImageCollection, cache: Path, damage: str
) -> None:
    first = load_reference(reference, colour_extractor())
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes(
        {"cut": whole[:middle], "flipped": flipped, "emptied": b"", "other": b"{}"}[damage]
    )
    counted = Counted(colour_extractor())
    assert_equal(load_reference(reference, counted.extractor), first)
    assert counted.count == 60
    assert file.read_bytes() == whole


def test_an_unwritable_cache_is_ignored(
    reference: ImageCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_reference(reference, colour_extractor())
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "file"))
    counted = Counted(colour_extractor())
    for _ in range(2):
        assert_equal(load_reference(reference, counted.extractor), first)
    assert counted.count == 120
    assert (tmp_path / "file").read_text() == "not a folder"


def test_the_cache_follows_xdg_cache_home(
    reference: ImageCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    load_reference(reference, colour_extractor())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_reference(reference, colour_extractor())
    found = {Path(here).relative_to(tmp_path) for here, _, files in os.walk(tmp_path) if files}
    assert found == {Path("home/.cache/ctf/references"), Path("xdg/ctf/references")}


# --- memory ---------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows are kept of 30,000 images than of the first 1000, and they are random."""
    monkeypatch.setattr(scores, "ROWS", 1000)
    block = noise(60, 6, 2)

    def batches() -> Iterator[Pixels]:
        for number in range(500):
            yield block // (1 + number % 2)

    tracemalloc.start()
    images = ImageCollection("many", "m", 30_000, (2, 2), batches)
    summary = summarize(colour_extractor(), images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.gaussian.count == 30_000 and peak < 2e6
    rows_ND = summary.rows.rows_ND
    assert rows_ND.shape == (1000, 6)
    np.testing.assert_allclose(rows_ND.mean(0), summary.gaussian.mean_D, rtol=0.05)


def test_random_rows_are_used_for_precision_and_all_images_for_fid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "ROWS", 50)
    samples, others = collection(noise(200, 0)), collection(noise(200, 1))
    known, summary = (
        load_reference(others, colour_extractor()),
        summarize(colour_extractor(), samples),
    )
    assert known.rows_MD is not None and len(known.rows_MD) == len(summary.rows.rows_ND) == 50
    found = compute_scores(summary, known, "")
    expected = dataclasses.asdict(manifold_scores(summary.rows.rows_ND, known.rows_MD))
    assert {name: found[name] for name in expected} == expected
    pooled = FeatureStatistics(6)
    pooled.add(colour_extractor()(noise(200, 0)).pooled_ND)
    distance = frechet_distance(pooled.gaussian, known.pooled)
    assert value(found["FID"]) == pytest.approx(distance, rel=1e-9)


def test_rfid_is_0_for_a_perfect_tokenizer_and_larger_for_worse_ones(
    pipe: Pipeline, splits: Splits
) -> None:
    extractor = open_extractor("fashion")
    images = from_image_sets("discs", (splits.train,))

    class Perfect:
        def parameters(self) -> Iterator[torch.Tensor]:
            return pipe.tokenizer.parameters()

        def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return images_BCHW

        def decode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return images_BCHW

    class Noise(Perfect):
        def decode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return torch.rand(images_BCHW.shape, generator=generator) * 2 - 1

    perfect, real, noise = (
        reconstruction_fid(tokenizer, images, extractor).value  # type: ignore[arg-type]
        for tokenizer in (Perfect(), pipe.tokenizer, Noise())
    )
    assert perfect < 1e-6 < real < noise
