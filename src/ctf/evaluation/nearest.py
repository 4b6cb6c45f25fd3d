"""Are samples copies? The nearest training images of samples, and of held-out images.

A model that copies has samples that are nearer to its training images than new images of the same
source are. So d(x), the distance of an image to its nearest training image, is compared between
samples s and held-out images h:

    nearer = P(d(s) < d(h)) + P(d(s) = d(h)) / 2      over all pairs (s, h)

This is the Mann-Whitney statistic of the test for data copying of Meehan, Chaudhuri and Dasgupta
(arXiv 2004.05675, section 3.1) for the whole space as one cell, divided by the number of pairs. It
is 1/2 if samples are as near as held-out images are, and above if they are nearer: if the interval
is above 1/2, the model copies, or its samples lack detail, since a blurred image is near to many.
Images next to their nearest training images tell the two apart. A few copies hardly change it;
`very_near` counts them: the share of samples that are nearer than 99 % of held-out images.

Distances are those of pixels, also of mirrored images where these are as plausible, and those of
the features of a network.

Shapes: N samples or held-out images, M training images, Q queries, B images of a block, S side of
an image in pixels, D numbers that an image is compared by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ctf.common import memory
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.common.rng import generator
from ctf.data.image_grid import image_grid
from ctf.data.image_set import Splits
from ctf.evaluation.extractors import Extractor
from ctf.evaluation.image_collection import ImageCollection
from ctf.evaluation.metrics import as_float64

PIXELS = "pixels"  # the distance that needs no network
SIDE = 32  # pixels at most that distances of pixels are computed from
QUERIES = 2000  # samples, and held-out images, whose nearest training images are searched for
BLOCK = 512  # training images in memory at a time
RESAMPLES = 1000  # of the bootstrap
SHOWN = 10  # samples of the sheet, for each distance
TILE = 128  # pixels of an image of the sheet, at most
FEWEST = 2  # held-out images


@dataclass(frozen=True)
class Nearest:
    """The content of "nearest" in report.json.

    images: name of the data set.
    train, held_out, samples: how many images of each were compared.
    by: for "pixels", and for the feature network: "nearer" with its 95 % interval ("low", "high"),
        "very_near", the medians of the distances of samples and of held-out images, and the samples
        that are nearest to a training image ("pairs").
    """

    images: str
    train: int
    held_out: int
    samples: int
    by: dict[str, dict[str, Any]]


# --- The statistic --------------------------------------------------------------------------------


def nearer(samples_N: np.ndarray, held_out_N: np.ndarray) -> float:
    """Compare distances of samples and of held-out images to their nearest training images.

    Returns:
        P(d(s) < d(h)) + P(d(s) = d(h)) / 2, over all pairs.
    """
    sorted_N = np.sort(held_out_N)
    below_N, up_to_N = (np.searchsorted(sorted_N, samples_N, side) for side in ("left", "right"))
    return float((1 - (below_N + up_to_N) / (2 * len(sorted_N))).mean())


def interval(
    samples_N: np.ndarray, held_out_N: np.ndarray, random: np.random.Generator
) -> tuple[float, float]:
    """Return the ends of the 95 % interval of `nearer`: percentiles of the bootstrap.

    It resamples samples and held-out images; the training images are fixed.
    """
    resampled = [
        nearer(random.choice(samples_N, len(samples_N)), random.choice(held_out_N, len(held_out_N)))
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


# --- The search -----------------------------------------------------------------------------------


class Search:
    """The nearest of a stream of rows for each query, by Euclidean distance.

    Memory grows with the queries, not with the rows.
    """

    def __init__(self, queries_QD: np.ndarray) -> None:
        self.queries_QD = queries_QD.astype(np.float32)
        self.count = 0  # rows so far
        self.numbers_Q = np.zeros(len(queries_QD), np.int64)  # of the nearest
        self._rows_QD = np.zeros_like(self.queries_QD)
        # Products lose precision where the mean is large.
        self._centre_D = self.queries_QD.mean(0)
        self._centred_DQ = (self.queries_QD - self._centre_D).T.copy()
        self._best_Q = np.full(len(queries_QD), np.inf)

    def add(self, rows_BD: np.ndarray) -> None:
        """Compare the next rows with all queries."""
        rows_BD = rows_BD.astype(np.float32)
        centred_BD = rows_BD - self._centre_D
        # Squared distances without the query's own square, which is the same for all rows.
        squares_BQ = centred_BD @ self._centred_DQ
        squares_BQ *= -2
        squares_BQ += np.einsum("bd,bd->b", centred_BD, centred_BD)[:, None]
        nearest_Q = squares_BQ.argmin(0)
        squares_Q = squares_BQ[nearest_Q, np.arange(len(nearest_Q))]
        better_Q = squares_Q < self._best_Q
        self._best_Q[better_Q] = squares_Q[better_Q]
        self.numbers_Q[better_Q] = self.count + nearest_Q[better_Q]
        self._rows_QD[better_Q] = rows_BD[nearest_Q[better_Q]]
        self.count += len(rows_BD)

    @property
    def distances_Q(self) -> np.ndarray:
        """Root mean square differences to the nearest rows, computed from these themselves."""
        differences_QD = (self.queries_QD - self._rows_QD).astype(np.float64)
        return np.asarray(np.sqrt(np.square(differences_QD).mean(1)))


def pixel_rows(images_NSSC: np.ndarray) -> np.ndarray:
    """Pixels of images, averaged down to at most SIDE on each side: (N, D) in 0..255."""
    images_NCSS = torch.from_numpy(np.ascontiguousarray(images_NSSC)).permute(0, 3, 1, 2).float()
    side = min(SIDE, images_NCSS.shape[-1])
    return F.adaptive_avg_pool2d(images_NCSS, side).flatten(1).numpy()


def find_nearest(
    images: ImageCollection,
    splits: Splits,
    extractor: Extractor,
    progress: Progress | None = None,
) -> tuple[Nearest, Image.Image]:
    """Compare samples and held-out images with all training images.

    Args:
        images: The samples, of the splits' image size. At most QUERIES are compared, at random.
        splits: Training images, and held-out images that the model has not seen either.
        extractor: The feature network.
        progress: Called with the number of training images that were compared, and to compare.

    Returns:
        The comparison, and a sheet of the samples that are nearest to a training image.

    Raises:
        UserError: See `check`.
    """
    check(images.size, splits)
    train = splits.train
    chosen_N, held_out_N = (_choose(count) for count in (images.count, len(splits.val)))
    samples_NSSC = _pick(images, chosen_N)
    queries_QSSC = np.concatenate([samples_NSSC, splits.val.read(held_out_N)])
    pixels_QD = pixel_rows(queries_QSSC)
    if train.mirrors:  # a mirrored copy is a copy
        pixels_QD = np.concatenate([pixels_QD, pixel_rows(queries_QSSC[:, :, ::-1])])
    features_QD = _features(extractor, queries_QSSC)
    searches = {PIXELS: Search(pixels_QD), extractor.name: Search(features_QD)}
    del queries_QSSC, pixels_QD, features_QD
    with memory.keep_freed():
        for start in range(0, len(train), BLOCK):
            block_BSSC = train.read(np.arange(start, min(start + BLOCK, len(train))))
            searches[PIXELS].add(pixel_rows(block_BSSC))
            searches[extractor.name].add(_features(extractor, block_BSSC))
            if progress is not None:
                progress(start + len(block_BSSC), len(train))

    by, shown = {}, []
    for key, (name, search) in enumerate(searches.items()):
        distances_Q, numbers_Q = _of_either_side(search, len(samples_NSSC) + len(held_out_N))
        own_N, other_N = np.split(distances_Q, [len(samples_NSSC)])
        low, high = interval(own_N, other_N, generator(0, 3, key))
        order_N = own_N.argsort(kind="stable")[:SHOWN]
        by[name] = {
            "nearer": nearer(own_N, other_N),
            "low": low,
            "high": high,
            "very_near": float((own_N < np.quantile(other_N, 0.01)).mean()),
            "median_samples": float(np.median(own_N)),
            "median_held_out": float(np.median(other_N)),
            "pairs": [
                {
                    "sample": int(chosen_N[i]),
                    "image": train.image_name(int(numbers_Q[i])),
                    "distance": float(own_N[i]),
                }
                for i in order_N
            ],
        }
        shown.append((f"samples that are nearest by {name}", samples_NSSC[order_N]))
        shown.append(("their nearest training images", train.read(numbers_Q[order_N])))
    found = Nearest(train.name, len(train), len(held_out_N), len(samples_NSSC), by)
    return found, image_grid([(name, [_tile(image) for image in row]) for name, row in shown])


def check(image_size: tuple[int, int], splits: Splits | None) -> Splits:
    """Return the splits, if images of that height and width can be compared with them.

    Raises:
        UserError: There are no training or held-out images, or they have another size.
    """
    if splits is None:
        raise UserError(
            "--nearest: needs the images that the model was trained on, and held-out ones\n"
            "pass them by --reference, as to ctf fit"
        )
    if len(splits.val) < FEWEST or not len(splits.train):
        raise UserError(
            f"--nearest: {splits.train.name} has {len(splits.train)} images to train on and "
            f"{len(splits.val)} held out, expected {FEWEST} or more of these"
        )
    size = splits.train.image_size
    if image_size != (size, size):
        height, width = image_size
        raise UserError(f"--nearest: images of {width} x {height} pixels, expected {size} x {size}")
    return splits


def _choose(count: int) -> np.ndarray:
    """Return the numbers of at most QUERIES random images of `count`, ascending."""
    return np.sort(generator(0, 2, count).permutation(count)[:QUERIES])


def _pick(images: ImageCollection, numbers_N: np.ndarray) -> np.ndarray:
    """Return some images of a collection (N, S, S, 3)."""
    picked, start = [], 0
    for batch in images.batches():
        inside_N = numbers_N[(numbers_N >= start) & (numbers_N < start + len(batch))]
        picked.append(batch[inside_N - start])
        start += len(batch)
    return np.concatenate(picked)


def _features(extractor: Extractor, images_NSSC: np.ndarray) -> np.ndarray:
    parts = [
        as_float64(extractor(images_NSSC[start : start + BLOCK]).pooled_ND).astype(np.float32)
        for start in range(0, len(images_NSSC), BLOCK)
    ]
    return np.concatenate(parts)


def _of_either_side(search: Search, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and numbers for each query: its own, or those of its mirror image."""
    distances_XQ = search.distances_Q.reshape(-1, count)
    numbers_XQ = search.numbers_Q.reshape(-1, count)
    sides_Q, all_Q = distances_XQ.argmin(0), np.arange(count)
    return distances_XQ[sides_Q, all_Q], numbers_XQ[sides_Q, all_Q]


def _tile(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((TILE, TILE))
    return image


# --- For people -----------------------------------------------------------------------------------


def rows(found: Nearest) -> list[tuple[str, str, str, str]]:
    """Format distance, share, interval and meaning of each comparison for a table."""
    return [
        (
            f"by {name}",
            f"{each['nearer']:.3f}",
            f"{each['low']:.3f} to {each['high']:.3f}",
            verdict(each),
        )
        for name, each in found.by.items()
    ]


def verdict(each: dict[str, Any]) -> str:
    """Say what a comparison means."""
    if each["low"] > 0.5:
        return "nearer than held-out images: look for copies in nearest.png"
    if each["high"] < 0.5:
        return "farther than held-out images: no sign of copying"
    return "as near as held-out images: no sign of copying"


def columns() -> Sequence[str]:
    """Return the header of `rows`."""
    return ("distance to training images", "nearer", "95 % interval", "samples are")


def describe(found: Nearest) -> str:
    """Say what was compared, and what the numbers mean."""
    very_near = ", ".join(f"{each['very_near']:.1%} by {name}" for name, each in found.by.items())
    return (
        f"Distances of {found.samples} samples and {found.held_out} held-out images to the nearest "
        f'of {found.train} training images of {found.images}. "Nearer" is the share of pairs in '
        "which the sample is nearer than the held-out image: 0.5 without copying, up to 1 for "
        f"copies. Nearer than 99 % of held-out images are {very_near} of samples (1 % is usual)."
    )
