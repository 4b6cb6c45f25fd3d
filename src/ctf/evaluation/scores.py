"""The features of images and of a reference -> all scores: FID, IS, KID, precision and so on.

Shapes: N samples, M reference images, D features, K classes of the network, C classes of the
images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ctf.common import cache, memory
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.common.rng import generator
from ctf.data.transforms import as_pil, as_tensor
from ctf.evaluation.distances import (
    FeatureStatistics,
    Gaussian,
    Reservoir,
    frechet_distance,
    frechet_distance_estimate,
    kernel_distance,
    manifold_scores,
)
from ctf.evaluation.extractors import Extractor, Features, concatenate
from ctf.evaluation.image_collection import ImageCollection, StoredStatistics
from ctf.evaluation.intervals import Estimate, RandomGroups
from ctf.evaluation.metrics import PredictionStatistics, as_float64, inception_score
from ctf.models.tokenizer import VQModel

VERSION = 1  # of sampling and scoring; part of the identity of an evaluation and of cached features
ROWS = 10_000  # random features that KID, precision, recall, density and coverage are computed from
CHUNK = 1024  # features added at a time: updating a covariance costs the same for fewer


class FeatureSummary:
    """The features of all images, as far as scores and their intervals need them.

    groups: pooled features of random groups of the images.
    predictions: of the same groups; None if the network has no classes.
    spatial: of all images; None if the network has no spatial features.
    rows: a random sample of the pooled features.
    class_sums_CD: sums of the pooled features of each class; None if the classes have no names.
    """

    def __init__(self, first: Features, images: ImageCollection) -> None:
        """Create an empty summary for features of the same widths as `first`."""
        width = first.pooled_ND.shape[1]
        self._random_groups = RandomGroups(generator(0, 1))
        group_range = range(self._random_groups.count)
        self.groups = [FeatureStatistics(width) for _ in group_range]
        self.predictions: list[PredictionStatistics] | None = None
        if first.logits_NK is not None:
            classes = first.logits_NK.shape[1]
            self.predictions = [PredictionStatistics(classes) for _ in group_range]
        self.spatial: FeatureStatistics | None = None
        if first.spatial_ND is not None:
            self.spatial = FeatureStatistics(first.spatial_ND.shape[1])
        self.rows = Reservoir(ROWS, width, generator(0, 2))
        self._classes_N = None if images.class_names is None else images.classes_N
        self.class_sums_CD: np.ndarray | None = None
        if self._classes_N is not None:
            self.class_sums_CD = np.zeros((len(images.class_names or ()), width))

    def add(self, features: Features) -> None:
        """Add the features of the next images."""
        start, pooled_ND = self.rows.count, as_float64(features.pooled_ND)
        groups_N = self._random_groups.assign(len(pooled_ND))
        for group, statistics in enumerate(self.groups):
            statistics.add(pooled_ND[groups_N == group])
        if self.predictions is not None and features.logits_NK is not None:
            logits_NK = as_float64(features.logits_NK)
            for group, predictions in enumerate(self.predictions):
                predictions.add(logits_NK[groups_N == group])
        if self.spatial is not None and features.spatial_ND is not None:
            self.spatial.add(features.spatial_ND)
        self.rows.add(pooled_ND)
        if self.class_sums_CD is not None and self._classes_N is not None:
            classes_N = self._classes_N[start : self.rows.count]
            np.add.at(self.class_sums_CD, classes_N, pooled_ND)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the pooled features of all images."""
        return FeatureStatistics.merge(self.groups).gaussian

    @property
    def class_means_CD(self) -> np.ndarray | None:
        """Mean pooled features of each class, NaN for a class without images."""
        if self.class_sums_CD is None or self._classes_N is None:
            return None
        counts_C = np.bincount(self._classes_N, minlength=len(self.class_sums_CD))
        with np.errstate(invalid="ignore"):
            return np.asarray(self.class_sums_CD / counts_C[:, None])


def summarize(
    extractor: Extractor, images: ImageCollection, progress: Progress | None = None
) -> FeatureSummary:
    """Extract and summarize the features of all images in memory that does not grow with them."""
    summary: FeatureSummary | None = None
    with memory.keep_freed():
        for features in _feature_chunks(extractor, images, progress):
            summary = summary or FeatureSummary(features, images)
            summary.add(features)
    assert summary is not None
    return summary


def _feature_chunks(
    extractor: Extractor, images: ImageCollection, progress: Progress | None
) -> Iterator[Features]:
    parts: list[Features] = []
    done = 0
    for batch in images.batches():
        parts.append(extractor(batch))
        done += len(batch)
        if progress is not None:
            progress(done, images.count)
        if sum(len(part.pooled_ND) for part in parts) >= CHUNK:
            yield concatenate(parts)
            parts = []
    if parts:
        yield concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The features that samples are scored against: all fields, or mean and covariance only."""

    pooled: Gaussian
    spatial: Gaussian | None
    rows_MD: np.ndarray | None = None
    class_means_CD: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


def load_reference(
    images: ImageCollection | StoredStatistics,
    extractor: Extractor,
    progress: Progress | None = None,
) -> Reference:
    """Compute the features of a reference, or load them from the user's cache folder.

    If there are both images and Inception statistics, as in ADM's reference batches, FID and sFID
    use the statistics, which are of the whole data set, and all other scores use the images, which
    are a part of it; so does ADM's evaluator. Stored statistics must have passed
    `check_statistics`.
    """
    if isinstance(images, StoredStatistics):
        return Reference(images.pooled, images.spatial)
    name = f"references/{images.fingerprint[:24]}-{extractor.digest[:24]}-{VERSION}.npz"
    arrays = cache.load(name)
    if arrays is None:
        arrays = _to_arrays(summarize(extractor, images, progress))
        cache.save(name, arrays)
    pooled, spatial = Gaussian(arrays["mu"], arrays["sigma"], images.count), None
    if "mu_s" in arrays:
        spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"], images.count)
    if (stored := images.statistics) is not None and extractor.name == "inception":
        pooled, spatial = stored.pooled, stored.spatial
    return Reference(pooled, spatial, arrays["rows"], arrays.get("class_means"), images.class_names)


def _to_arrays(summary: FeatureSummary) -> dict[str, Any]:
    pooled, means_CD = summary.gaussian, summary.class_means_CD
    arrays = {"mu": pooled.mean_D, "sigma": pooled.covariance_DD, "rows": summary.rows.rows_ND}
    if summary.spatial is not None:
        spatial = summary.spatial.gaussian
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    return arrays if means_CD is None else {**arrays, "class_means": means_CD}


def check_statistics(stored: StoredStatistics, extractor: Extractor, size: int) -> None:
    """Check that stored statistics are of the extractor's features.

    If the file does not say which features it has, compare their number with that of an image of
    `size` pixels per side.

    Raises:
        UserError: they are of other features.
    """
    if stored.features is not None:
        if stored.features != extractor.digest:
            raise UserError(
                f"{stored.name}: made with other features than {extractor.name}\n"
                "make it again, or choose its --features"
            )
        return
    features = extractor(np.zeros((1, size, size, 3), np.uint8))
    for gaussian, rows_1D in (
        (stored.pooled, features.pooled_ND),
        (stored.spatial, features.spatial_ND),
    ):
        if gaussian is not None and rows_1D is not None:
            got, expected = len(gaussian.mean_D), rows_1D.shape[1]
            if got != expected:
                raise UserError(
                    f"{stored.name}: statistics of {got} features, but {extractor.name} has "
                    f"{expected}\nchoose the --features that it was made with"
                )


def compute_scores(
    samples: FeatureSummary, reference: Reference, suffix: str
) -> dict[str, Estimate | float]:
    """Compute all scores that the reference and the network allow, by name plus `suffix`.

    Raises:
        UserError: too few images, or another number of features than the reference has.
    """
    scores: dict[str, Estimate | float] = {
        "FID": frechet_distance_estimate(samples.groups, reference.pooled)
    }
    if samples.spatial is not None and reference.spatial is not None:
        scores["sFID"] = frechet_distance(samples.spatial.gaussian, reference.spatial)
    if samples.predictions is not None:
        scores["IS"] = inception_score(samples.predictions)
    if reference.rows_MD is not None:
        rows_ND = samples.rows.rows_ND
        scores["KID"] = kernel_distance(rows_ND, reference.rows_MD, generator(0))
        scores |= dataclasses.asdict(manifold_scores(rows_ND, reference.rows_MD))
    return {f"{name}{suffix}": score for name, score in scores.items()}


@torch.inference_mode()
def reconstruction_fid(
    tokenizer: VQModel,
    images: ImageCollection,
    extractor: Extractor,
    progress: Progress | None = None,
) -> Estimate:
    """Compute the rFID of a tokenizer: the Frechet distance of reconstructions to originals.

    Raises:
        UserError: too few images for an interval.
    """
    device = next(tokenizer.parameters()).device

    def reconstructions() -> Iterator[np.ndarray]:
        for batch in images.batches():
            images_BCHW = tokenizer.decode(tokenizer.encode(as_tensor(batch, device)))
            yield np.stack([np.asarray(image) for image in as_pil(images_BCHW)])

    reference = load_reference(images, extractor, progress)
    reconstructed = dataclasses.replace(images, batches=reconstructions)
    return frechet_distance_estimate(
        summarize(extractor, reconstructed, progress).groups, reference.pooled
    )
