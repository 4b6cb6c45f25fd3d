"""Pictures and a reference, seen by one network -> scores: FID, IS, KID, precision and so on.

Shapes: N sampled pictures, M reference pictures, D features, C classes of a pipeline.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctf import checkpoint
from ctf.collection import Collection, Statistics
from ctf.distances import (
    FeatureStatistics,
    Gaussian,
    Reservoir,
    frechet_distance,
    frechet_distance_estimate,
    kernel_distance,
    manifold_scores,
)
from ctf.errors import UserError
from ctf.extractors import Extractor
from ctf.loop import generator
from ctf.metrics import Estimate, Groups, PredictionStatistics, inception_score

Report = Callable[[int, int], None]
Score = Estimate | float

ROWS = 10_000  # features kept for KID, precision, recall, density and coverage


@dataclasses.dataclass
class Gathered:
    """Statistics of the features of pictures; in groups, for intervals."""

    pooled: Groups[FeatureStatistics]
    spatial: FeatureStatistics | None
    predictions: Groups[PredictionStatistics] | None
    rows: Reservoir
    class_sums_CD: np.ndarray | None
    recognised: list[np.ndarray]  # the likeliest class of each picture, by batches


def gather(
    extractor: Extractor, pictures: Collection, seed: int, report: Report | None = None
) -> Gathered:
    """Looks at every picture once, in the memory of a batch and of the statistics."""
    found: Gathered | None = None
    seen = 0
    for batch in pictures.batches():
        features = extractor(batch)
        width = features.pooled_ND.shape[1]
        logits_NK, spatial_ND = features.logits_NK, features.spatial_ND
        if found is None:
            predictions = None
            if logits_NK is not None:
                empty = partial(PredictionStatistics, logits_NK.shape[1])
                predictions = Groups(empty, generator(seed, 1))
            of_class = None if pictures.class_names is None else len(pictures.class_names)
            found = Gathered(
                Groups(partial(FeatureStatistics, width), generator(seed, 1)),
                None if spatial_ND is None else FeatureStatistics(spatial_ND.shape[1]),
                predictions,
                Reservoir(ROWS, width, generator(seed, 2)),
                None if of_class is None else np.zeros((of_class, width)),
                [],
            )
        found.pooled.add(features.pooled_ND)
        found.rows.add(features.pooled_ND)
        if found.spatial is not None and spatial_ND is not None:
            found.spatial.add(spatial_ND)
        if found.predictions is not None and logits_NK is not None:
            found.predictions.add(logits_NK)
            found.recognised.append(logits_NK.argmax(1).numpy())
        if found.class_sums_CD is not None and pictures.classes_N is not None:
            rows = pictures.classes_N[seen : seen + len(batch)]
            np.add.at(found.class_sums_CD, rows, features.pooled_ND.double().numpy())
        seen += len(batch)
        if report is not None:
            report(seen, pictures.count)
    assert found is not None
    return found


@dataclasses.dataclass(frozen=True)
class Reference:
    """What scores are made against: all of it, or mean and covariance alone."""

    name: str
    fingerprint: str
    count: int | None
    pooled: Gaussian
    spatial: Gaussian | None
    rows_MD: np.ndarray | None = None
    class_means_CD: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


def look_at_reference(
    found: Collection | Statistics, extractor: Extractor, report: Report | None = None
) -> Reference:
    """The features of a reference; they are kept for the next time in the user's cache folder.

    Raises:
        UserError: statistics of other features than the extractor's.
    """
    if isinstance(found, Statistics):
        if found.features not in (None, extractor.digest):
            raise UserError(
                f"{found.name}: made with other features than {extractor.name}; make it again, or "
                "choose those features"
            )
        return Reference(found.name, found.fingerprint, None, found.pooled, found.spatial)
    name = f"{found.fingerprint[:24]}-{extractor.digest[:24]}.npz"
    path = _cache() / "references" / name
    arrays = _read_cache(path)
    if arrays is None:
        gathered = gather(extractor, found, seed=0, report=report)
        arrays = _arrays(gathered, found)
        with checkpoint.atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    spatial = None
    if "mu_s" in arrays:
        spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"], found.count)
    return Reference(
        found.name,
        found.fingerprint,
        found.count,
        Gaussian(arrays["mu"], arrays["sigma"], found.count),
        spatial,
        arrays["rows"],
        arrays.get("class_means"),
        found.class_names,
    )


def _arrays(gathered: Gathered, found: Collection) -> dict[str, Any]:
    pooled = gathered.pooled.merged().gaussian
    arrays: dict[str, Any] = {
        "mu": pooled.mean_D,
        "sigma": pooled.covariance_DD,
        "rows": gathered.rows.rows_ND,
    }
    if gathered.spatial is not None:
        spatial = gathered.spatial.gaussian
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    if (means_CD := class_means(gathered, found)) is not None:
        arrays["class_means"] = means_CD
    return arrays


def class_means(gathered: Gathered, pictures: Collection) -> np.ndarray | None:
    """Mean features of each class (C, D); None where no classes are known. NaN for empty ones."""
    if gathered.class_sums_CD is None or pictures.classes_N is None:
        return None
    counts_C = np.bincount(pictures.classes_N, minlength=len(gathered.class_sums_CD))
    with np.errstate(invalid="ignore"):
        means_CD: np.ndarray = gathered.class_sums_CD / counts_C[:, None]
    return means_CD


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CTF_CACHE") or Path(home) / "ctf")


def _read_cache(path: Path) -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None  # not there, or damaged: it is made again


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
        manifold = manifold_scores(rows_ND, reference.rows_MD)
        found |= dataclasses.asdict(manifold)
    return {f"{name}{suffix}": score for name, score in found.items()}
