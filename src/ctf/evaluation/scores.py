"""Pictures and a reference, seen by one network -> scores: FID, IS, KID, precision and so on.

Shapes: N sampled pictures, M reference pictures, D features, K and C classes of the network and of
the pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ctf.common import cache
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
from ctf.evaluation.extractors import Extractor, Features
from ctf.evaluation.metrics import Estimate, Groups, PredictionStatistics, inception_score
from ctf.evaluation.reference_sets import Collection, Statistics
from ctf.models.tokenizer import VQModel

Score = Estimate | float

VERSION = 1  # of how pictures are drawn and scored; another one makes everything anew
ROWS = 10_000  # features kept for KID, precision, recall, density and coverage
CHUNK = 1024  # features added at once: a covariance of 2048 costs as much for a few as for these


class Gathered:
    """What is known of the features of pictures; in random groups, for intervals.

    class_sums_CD: sums of the features of each class, where the pictures' classes have names.
    """

    def __init__(self, first: Features, pictures: Collection) -> None:
        """Empty, for features of the same widths as the first."""
        width = first.pooled_ND.shape[1]
        self._pictures = pictures
        self._seen = 0
        self.pooled = Groups(partial(FeatureStatistics, width), generator(0, 1))
        self.rows = Reservoir(ROWS, width, generator(0, 2))
        self.spatial: FeatureStatistics | None = None
        if first.spatial_ND is not None:
            self.spatial = FeatureStatistics(first.spatial_ND.shape[1])
        self.predictions: Groups[PredictionStatistics] | None = None
        if first.logits_NK is not None:
            empty = partial(PredictionStatistics, first.logits_NK.shape[1])
            self.predictions = Groups(empty, generator(0, 1))
        self.class_sums_CD: np.ndarray | None = None
        if pictures.classes_N is not None and pictures.class_names is not None:
            self.class_sums_CD = np.zeros((len(pictures.class_names), width))

    def add(self, features: Features) -> None:
        """Those of the next pictures."""
        self.pooled.add(features.pooled_ND)
        self.rows.add(features.pooled_ND)
        if self.spatial is not None and features.spatial_ND is not None:
            self.spatial.add(features.spatial_ND)
        if self.predictions is not None and features.logits_NK is not None:
            self.predictions.add(features.logits_NK)
        seen = self._seen + len(features.pooled_ND)
        if self.class_sums_CD is not None and self._pictures.classes_N is not None:
            classes_N = self._pictures.classes_N[self._seen : seen]
            np.add.at(self.class_sums_CD, classes_N, features.pooled_ND.double().numpy())
        self._seen = seen

    @property
    def class_means_CD(self) -> np.ndarray | None:
        """Mean features of each class, NaN where it has no picture; None where none is known."""
        if self.class_sums_CD is None or self._pictures.classes_N is None:
            return None
        counts_C = np.bincount(self._pictures.classes_N, minlength=len(self.class_sums_CD))
        with np.errstate(invalid="ignore"):
            means_CD: np.ndarray = self.class_sums_CD / counts_C[:, None]
        return means_CD


def gather(
    extractor: Extractor, pictures: Collection, progress: Progress | None = None
) -> Gathered:
    """Looks at every picture once, in the memory of a chunk and of the statistics."""
    found: Gathered | None = None
    for features in _look(extractor, pictures, progress):
        found = found or Gathered(features, pictures)
        found.add(features)
    assert found is not None
    return found


def _look(
    extractor: Extractor, pictures: Collection, progress: Progress | None
) -> Iterator[Features]:
    """The features of all pictures, a chunk at a time."""
    parts: list[Features] = []
    seen = 0
    for batch in pictures.batches():
        parts.append(extractor(batch))
        seen += len(batch)
        if progress is not None:
            progress(seen, pictures.count)
        if sum(len(part.pooled_ND) for part in parts) >= CHUNK:
            yield _joined(parts)
            parts = []
    if parts:
        yield _joined(parts)


def _joined(parts: list[Features]) -> Features:
    def all_of(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Features(all_of("pooled_ND"), all_of("spatial_ND"), all_of("logits_NK"))


@dataclasses.dataclass(frozen=True)
class Reference:
    """What scores are made against: all of it, or mean and covariance alone."""

    pooled: Gaussian
    spatial: Gaussian | None
    rows_MD: np.ndarray | None = None
    class_means_CD: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


def look_at_reference(
    found: Collection | Statistics, extractor: Extractor, progress: Progress | None = None
) -> Reference:
    """The features of a reference; they are kept for the next time in the user's cache folder.

    Where it has both pictures and statistics of Inception, as ADM's reference batches, FID and sFID
    are against the statistics, which are of all pictures of the set, and the rest is against the
    pictures, which are some of them. So does ADM's evaluator.

    Args:
        found: pictures, or statistics that `check_features` let pass.
    """
    if isinstance(found, Statistics):
        return Reference(found.pooled, found.spatial)
    name = f"{found.fingerprint[:24]}-{extractor.digest[:24]}-{VERSION}.npz"
    arrays = cache.load(f"references/{name}")
    if arrays is None:
        arrays = _arrays(gather(extractor, found, progress))
        cache.save(f"references/{name}", arrays)
    pooled, spatial = Gaussian(arrays["mu"], arrays["sigma"], found.count), None
    if "mu_s" in arrays:
        spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"], found.count)
    if (stored := found.statistics) is not None and extractor.name == "inception":
        pooled, spatial = stored.pooled, stored.spatial
    return Reference(pooled, spatial, arrays["rows"], arrays.get("class_means"), found.class_names)


def check_features(found: Statistics, extractor: Extractor, size: int) -> None:
    """Looks at a picture of `size` pixels a side, where the statistics don't say what they are of.

    Raises:
        UserError: they are of other features than the extractor's.
    """
    if found.features is not None:
        if found.features != extractor.digest:
            raise UserError(
                f"{found.name}: made with other features than {extractor.name}\n"
                "make it again, or choose its --features"
            )
        return
    seen = extractor(np.zeros((1, size, size, 3), np.uint8))
    for stored, rows_1D in ((found.pooled, seen.pooled_ND), (found.spatial, seen.spatial_ND)):
        if stored is None or rows_1D is None:
            continue
        got, expected = len(stored.mean_D), rows_1D.shape[1]
        if got != expected:
            raise UserError(
                f"{found.name}: statistics of {got} features, but {extractor.name} has {expected}\n"
                "choose the --features that it was made with"
            )


def _arrays(gathered: Gathered) -> dict[str, Any]:
    pooled = gathered.pooled.merged().gaussian
    arrays: dict[str, Any] = {
        "mu": pooled.mean_D,
        "sigma": pooled.covariance_DD,
        "rows": gathered.rows.rows_ND,
    }
    if gathered.spatial is not None:
        spatial = gathered.spatial.gaussian
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    if (means_CD := gathered.class_means_CD) is not None:
        arrays["class_means"] = means_CD
    return arrays


def scores(samples: Gathered, reference: Reference, suffix: str) -> dict[str, Score]:
    """All scores that the reference and the network allow; `suffix` is put behind their names.

    Raises:
        UserError: too few pictures, or features of another number than the reference's.
    """
    found: dict[str, Score] = {
        "FID": frechet_distance_estimate(samples.pooled.parts, reference.pooled)
    }
    if samples.spatial is not None and reference.spatial is not None:
        found["sFID"] = frechet_distance(samples.spatial.gaussian, reference.spatial)
    if samples.predictions is not None:
        found["IS"] = inception_score(samples.predictions.parts)
    if reference.rows_MD is not None:
        rows_ND = samples.rows.rows_ND
        found["KID"] = kernel_distance(rows_ND, reference.rows_MD, generator(0))
        found |= dataclasses.asdict(manifold_scores(rows_ND, reference.rows_MD))
    return {f"{name}{suffix}": score for name, score in found.items()}


@torch.inference_mode()
def reconstruction_distance(
    tokenizer: VQModel, pictures: Collection, extractor: Extractor, progress: Progress | None = None
) -> Estimate:
    """rFID of a tokenizer: the Frechet distance of reconstructions to the pictures themselves.

    Raises:
        UserError: too few pictures for an interval.
    """
    device = next(tokenizer.parameters()).device

    def reconstructed() -> Iterator[np.ndarray]:
        for batch in pictures.batches():
            images_BCHW = tokenizer.decode(tokenizer.encode(as_tensor(batch, device)))
            yield np.stack([np.asarray(picture) for picture in as_pil(images_BCHW)])

    known = look_at_reference(pictures, extractor, progress)
    found = gather(extractor, dataclasses.replace(pictures, batches=reconstructed), progress)
    return frechet_distance_estimate(found.pooled.parts, known.pooled)
