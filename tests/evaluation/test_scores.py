"""Scores of pictures against a reference: closed forms, an order that must hold, and the cache."""

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
from ctf.evaluation import reference_sets, scores
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance, manifold_scores
from ctf.evaluation.extractors import Extractor, Features, open_extractor
from ctf.evaluation.metrics import Estimate
from ctf.evaluation.reference_sets import Collection, Statistics, of_sets, open_reference
from ctf.evaluation.scores import (
    Gathered,
    Reference,
    check_features,
    gather,
    look_at_reference,
    reconstruction_distance,
)
from ctf.pipelines.pipeline import Pipeline
from tests.gallery import Pixels, colours, noise, of_pixels

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def value(score: scores.Score) -> float:
    return score.value if isinstance(score, Estimate) else score


def scored(
    samples: Collection, reference: Collection | Statistics, extractor: Extractor
) -> dict[str, float]:
    known = look_at_reference(reference, extractor)
    found = scores.scores(gather(extractor, samples), known, extractor.suffix)
    return {name.removesuffix(extractor.suffix): value(score) for name, score in found.items()}


class Watched:
    """Counts how many pictures an extractor looks at."""

    def __init__(self, extractor: Extractor) -> None:
        self.count = 0
        self.extractor = dataclasses.replace(extractor, look=self.look)
        self.inner = extractor.look

    def look(self, images: Pixels) -> Features:
        self.count += len(images)
        return self.inner(images)


# --- what is gathered -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_it_is_that_of_all_features_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK", chunk)
    pixels, classes_N = noise(120, 0), np.arange(120) % 3
    classes_N[classes_N == 1] = 2  # b has none
    seen: list[tuple[int, int]] = []
    found = gather(
        colours(), of_pixels(pixels, classes_N, NAMES), lambda *given: seen.append(given)
    )
    features = colours()(pixels)
    pooled_ND = features.pooled_ND.double().numpy()
    merged = found.pooled.merged().gaussian
    np.testing.assert_allclose(merged.mean_D, pooled_ND.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance_DD, np.cov(pooled_ND, rowvar=False), rtol=1e-9)
    assert [part.count for part in found.pooled.parts] == [12] * 10
    assert found.spatial is not None and found.spatial.count == 120
    assert found.predictions is not None
    assert found.predictions.merged().count == 120
    assert np.array_equal(found.rows.rows_ND, features.pooled_ND.numpy())
    means_CD = found.class_means_CD
    assert means_CD is not None and np.isnan(means_CD[1]).all()
    for number in (0, 2):
        of_class = pooled_ND[classes_N == number]
        np.testing.assert_allclose(means_CD[number], of_class.mean(0), rtol=1e-12)
    assert seen == [*((n, 120) for n in range(7, 120, 7)), (120, 120)]


@pytest.mark.parametrize(("classes", "names"), [(None, None), (np.zeros(20, int), None)])
def test_no_means_of_classes_without_names(classes: Any, names: Any) -> None:
    assert gather(colours(), of_pixels(noise(20, 0), classes, names)).class_means_CD is None


# --- closed forms and orders ----------------------------------------------------------------------


def test_pictures_against_themselves() -> None:
    pictures = of_pixels(noise(200, 1))
    found = scored(pictures, pictures, colours())
    assert list(found) == [
        "FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage"
    ]  # fmt: skip
    assert found["FID"] == pytest.approx(0, abs=1e-9)
    assert found["sFID"] == pytest.approx(0, abs=1e-9)
    assert [found[n] for n in ("precision", "recall", "density", "coverage")] == [1, 1, 1, 1]
    assert found["KID"] < 0  # unbiased: that of two samples of one kind is 0 on average


def test_a_shift_is_its_square() -> None:
    """Brighter by 30: each of three means moves by 3, no deviation does."""
    pixels = noise(300, 2) // 2
    found = scored(of_pixels(pixels + 30), of_pixels(pixels), colours())
    assert found["FID"] == pytest.approx(3 * 3**2, rel=1e-6)


def test_sure_predictions_of_every_class() -> None:
    pixels = np.zeros((300, 4, 4, 3), np.uint8)
    pixels[np.arange(300), ..., np.arange(300) % 3] = 255  # red, green, blue in turn
    gathered = gather(colours(), of_pixels(pixels))
    assert gathered.predictions is not None
    assert gathered.predictions.merged().score == pytest.approx(3, rel=1e-6)
    # Of groups of 30 at random, as is usual, some have a colour more often than others.
    found = scored(of_pixels(pixels), of_pixels(noise(50, 3)), colours())
    assert 2.7 < found["IS"] < 3


def test_better_pictures_score_better() -> None:
    """Real pictures, the same blurred, and noise, against other real ones of Fashion-MNIST."""
    images = open_images("fashion-mnist").val
    real, others = images.read(np.arange(600)), images.read(np.arange(600, 1200))
    blur = ImageFilter.GaussianBlur(2)
    blurred = np.stack([np.asarray(Image.fromarray(p).filter(blur)) for p in real])
    extractor = open_extractor("fashion")
    found = [
        scored(of_pixels(pixels), of_pixels(others), extractor)
        for pixels in (real, blurred, noise(600, 4, 32))
    ]
    for name, sign in (("FID", 1), ("KID", 1), ("precision", -1), ("recall", -1), ("coverage", -1)):
        best, middle, worst = (sign * one[name] for one in found)
        assert best < middle <= worst, name
    assert found[0]["FID"] < 0.2 * found[1]["FID"]


def test_intervals_are_those_of_scores_with_one() -> None:
    pictures = of_pixels(noise(40, 5))
    known = look_at_reference(pictures, colours())
    found = scores.scores(gather(colours(), pictures), known, "-x")
    assert {n for n, s in found.items() if isinstance(s, Estimate)} == {"FID-x", "IS-x", "KID-x"}


def test_without_classes_there_is_no_inception_score() -> None:
    pictures = of_pixels(noise(40, 5))
    assert "IS" not in scored(pictures, pictures, colours(with_logits=False))


def test_too_few_pictures() -> None:
    with pytest.raises(UserError, match="got 9 images; an interval over 10 groups needs 10"):
        scored(of_pixels(noise(9, 0)), of_pixels(noise(40, 1)), colours())


# --- statistics as a reference --------------------------------------------------------------------


def statistics(gathered: Gathered, features: str | None) -> Statistics:
    spatial = None if gathered.spatial is None else gathered.spatial.gaussian
    return Statistics("s.npz", "f", gathered.pooled.merged().gaussian, spatial, features)


def test_statistics_give_the_same_distances(tmp_path: Path) -> None:
    """And nothing that needs the pictures themselves."""
    samples, reference, extractor = of_pixels(noise(60, 0)), of_pixels(noise(80, 1) // 2), colours()
    with_pictures = scored(samples, reference, extractor)
    found = statistics(gather(extractor, reference), extractor.digest)
    path = tmp_path / "s.npz"
    reference_sets.save_statistics(path, found.pooled, found.spatial, extractor.digest)
    stored = scored(samples, open_reference(str(path), 8), extractor)
    assert list(stored) == ["FID", "sFID", "IS"]
    for name, score in stored.items():
        assert score == pytest.approx(with_pictures[name], rel=1e-9)


def test_statistics_of_other_features() -> None:
    made = statistics(gather(colours(), of_pixels(noise(60, 0))), "c")
    check_features(made, colours(), 8)
    with pytest.raises(UserError, match=r"s\.npz: made with other features than colours"):
        check_features(made, colours(digest="another"), 8)
    unsaid = dataclasses.replace(made, features=None)
    check_features(unsaid, colours(digest="another"), 8)
    with pytest.raises(UserError, match=r"s\.npz: statistics of 6 features, but fashion has 128"):
        check_features(unsaid, open_extractor("fashion"), 8)
    spatial = dataclasses.replace(unsaid, spatial=Gaussian(np.zeros(5), np.eye(5)))
    with pytest.raises(UserError, match=r"statistics of 5 features, but colours has 3"):
        check_features(spatial, colours(), 8)


def test_reference_batches_of_adm() -> None:
    """For Inception, the distances are to the statistics of the whole set, the rest to its part."""
    whole = of_pixels(noise(400, 0) // 2)
    part = of_pixels(noise(400, 0)[:50] // 2)
    samples, inception = of_pixels(noise(60, 1)), colours("inception")
    batch = dataclasses.replace(part, statistics=statistics(gather(inception, whole), None))
    against_whole, against_part = (scored(samples, one, inception) for one in (whole, part))
    found = scored(samples, batch, inception)
    for name in ("FID", "sFID"):
        assert found[name] == pytest.approx(against_whole[name], rel=1e-9)
        assert found[name] != pytest.approx(against_part[name], rel=1e-3)
    for name in ("KID", "precision", "recall", "density", "coverage"):
        assert found[name] == against_part[name]
    assert scored(samples, batch, colours()) == scored(samples, part, colours())


# --- the cache ------------------------------------------------------------------------------------


def equal(a: Reference, b: Reference) -> None:
    assert np.array_equal(a.pooled.covariance_DD, b.pooled.covariance_DD)
    assert a.rows_MD is not None and b.rows_MD is not None
    assert np.array_equal(a.rows_MD, b.rows_MD)
    assert a.class_means_CD is not None and b.class_means_CD is not None
    assert np.array_equal(a.class_means_CD, b.class_means_CD, equal_nan=True)
    assert a.class_names == b.class_names == NAMES


@pytest.fixture
def reference() -> Collection:
    return of_pixels(noise(60, 0), np.arange(60) % 2, NAMES)


def test_a_reference_is_looked_at_once(reference: Collection, cache: Path) -> None:
    watched = Watched(colours())
    first = look_at_reference(reference, watched.extractor)
    assert watched.count == 60 and len(list(cache.iterdir())) == 1
    seen: list[Any] = []
    again = look_at_reference(reference, watched.extractor, lambda *given: seen.append(given))
    assert watched.count == 60 and seen == []
    equal(first, again)
    look_at_reference(reference, dataclasses.replace(watched.extractor, digest="other"))
    look_at_reference(of_pixels(noise(30, 1)), watched.extractor)
    assert watched.count == 150 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_file_is_made_again(reference: Collection, cache: Path, damage: str) -> None:
    first = look_at_reference(reference, colours())
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.write_bytes(
        {"cut": whole[:middle], "flipped": flipped, "emptied": b"", "other": b"{}"}[damage]
    )
    watched = Watched(colours())
    equal(look_at_reference(reference, watched.extractor), first)
    assert watched.count == 60
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    reference: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = look_at_reference(reference, colours())
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "file"))
    watched = Watched(colours())
    for _ in range(2):
        equal(look_at_reference(reference, watched.extractor), first)
    assert watched.count == 120
    assert (tmp_path / "file").read_text() == "not a folder"


def test_where_the_cache_is(
    reference: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    look_at_reference(reference, colours())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    look_at_reference(reference, colours())
    found = {Path(here).relative_to(tmp_path) for here, _, files in os.walk(tmp_path) if files}
    assert found == {Path("home/.cache/ctf/references"), Path("xdg/ctf/references")}


# --- memory ---------------------------------------------------------------------------------------


def test_many_pictures_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30,000 pictures no more is kept than of the first 1000, and what is kept is random."""
    monkeypatch.setattr(scores, "ROWS", 1000)
    block = noise(60, 6, 2)

    def batches() -> Iterator[Pixels]:
        for number in range(500):
            yield block // (1 + number % 2)

    tracemalloc.start()
    found = gather(colours(), Collection("many", "m", 30_000, (2, 2), batches))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.pooled.merged().count == 30_000 and peak < 2e6
    kept, whole = found.rows.rows_ND, found.pooled.merged().gaussian
    assert kept.shape == (1000, 6)
    np.testing.assert_allclose(kept.mean(0), whole.mean_D, rtol=0.05)


def test_kept_rows_are_the_ones_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROWS", 50)
    samples, others = of_pixels(noise(200, 0)), of_pixels(noise(200, 1))
    known, gathered = look_at_reference(others, colours()), gather(colours(), samples)
    assert known.rows_MD is not None and len(known.rows_MD) == len(gathered.rows.rows_ND) == 50
    found = scores.scores(gathered, known, "")
    expected = dataclasses.asdict(manifold_scores(gathered.rows.rows_ND, known.rows_MD))
    assert {name: found[name] for name in expected} == expected
    pooled = FeatureStatistics(6)  # FID is of all of them
    pooled.add(colours()(noise(200, 0)).pooled_ND)
    distance = frechet_distance(pooled.gaussian, known.pooled)
    assert value(found["FID"]) == pytest.approx(distance, rel=1e-9)


def test_reconstructions_are_nearer_than_noise(pipe: Pipeline, splits: Splits) -> None:
    """rFID: 0 for a tokenizer that changes nothing, and more the worse it is."""
    extractor = open_extractor("fashion")
    pictures = of_sets("discs", (splits.train,))

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
        reconstruction_distance(tokenizer, pictures, extractor).value  # type: ignore[arg-type]
        for tokenizer in (Perfect(), pipe.tokenizer, Noise())
    )
    assert perfect < 1e-6 < real < noise
