"""What a data set was understood to be, in a few lines: classes, splits, and what is left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ctf.data.image_set import Splits

CLASSES, NAMES = 8, 20  # listed of each kind in the short summary
# Plurals of reasons; others are the same for one file and for several.
PLURALS = {"not an image": "not images"}


def summarize(images: Splits, *, full: bool = False) -> str:
    """Return how a data set was understood.

    Args:
        images: the data set.
        full: list all classes and the names of all files that are left out.

    Returns:
        Lines such as "27,000 images in 10 classes: AnnualCrop (3,000), ...; 12 files left out: 9
        not images (.txt, .db), 2 unreadable, 1 too small", and how classes and splits were found.
    """
    return "\n".join(_lines(images, full))


def to_json(images: Splits) -> dict[str, Any]:
    """Return the same as plain values: numbers of images of each class, and left out by reason."""
    return {
        "train": len(images.train),
        "val": len(images.val),
        "classes": dict(zip(images.train.class_names, class_counts(images), strict=True)),
        "understood": list(images.understood),
        "left_out": {reason: len(names) for reason, names in _left_out(images).items()},
    }


def class_counts(images: Splits) -> list[int]:
    """Return the number of images of each class, in both splits together."""
    classes_N = np.concatenate([images.train.classes_N, images.val.classes_N])
    counts: list[int] = np.bincount(classes_N, minlength=len(images.train.class_names)).tolist()
    return counts


def untrained_classes(images: Splits) -> list[str]:
    """Return the names of classes all of whose images are held out."""
    names = images.train.class_names
    counts = np.bincount(images.train.classes_N, minlength=len(names))
    return [name for name, count in zip(names, counts, strict=True) if count == 0]


def _lines(images: Splits, full: bool) -> Iterator[str]:
    counts, left_out = class_counts(images), _left_out(images)
    classes = [f"{n} ({c:,})" for n, c in zip(images.train.class_names, counts, strict=True)]
    parts = [f"{sum(counts):,} images in {_classes(classes, counts, full)}"]
    if left_out:
        files = sum(map(len, left_out.values()))
        parts.append(
            f"{files:,} {images.unit}{'s' * (files != 1)} left out: {describe_left_out(left_out)}"
        )
    yield "; ".join(parts)
    yield f"{len(images.train):,} to train on, {len(images.val):,} held out"
    yield from images.understood
    if untrained := untrained_classes(images):
        yield f"never trained on, since their only images are held out: {_some(untrained, full)}"
    for reason, names in left_out.items() if full else ():
        yield f"left out, {reason}: {', '.join(names)}"
    if images.skipped:
        yield f"unusable: {_some([f'{bad.name} ({bad.reason})' for bad in images.skipped], full)}"


def _classes(classes: Sequence[str], counts: Sequence[int], full: bool) -> str:
    number = f"{len(classes):,} class{'es' * (len(classes) != 1)}"
    if full or len(classes) <= CLASSES + 2:
        return f"{number}: {', '.join(classes)}"
    shown = ", ".join(classes[:CLASSES])
    return f"{number}, of {min(counts):,} to {max(counts):,} each: {shown}, ..., {classes[-1]}"


def _some(names: Sequence[str], full: bool) -> str:
    if full or len(names) <= NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES])} and {len(names) - NAMES:,} more (listed by --dry-run)"


def _left_out(images: Splits) -> dict[str, Sequence[str]]:
    """Return the names of all files that are not used, by reason."""
    unusable: dict[str, list[str]] = defaultdict(list)
    for bad in images.skipped:
        kind = "too small" if "smaller than" in bad.reason else "unreadable"
        unusable["without a label" if bad.reason.startswith("no ") else kind].append(bad.name)
    return {**images.left_out, **unusable}


def describe_left_out(left_out: Mapping[str, Sequence[str]]) -> str:
    """Return "9 not images (.txt, .db), 2 unreadable" for {"not an image (.txt)": [...], ...}."""
    counts: dict[str, int] = defaultdict(int)
    details: dict[str, list[str]] = defaultdict(list)
    for reason, names in left_out.items():
        kind, _, detail = reason.removesuffix(")").partition(" (")
        counts[kind] += len(names)
        details[kind] += [detail] * bool(detail)
    parts = []
    for kind, count in counts.items():
        text = PLURALS.get(kind, kind) if count != 1 else kind
        text = "in " * kind.startswith("split ") + text
        parts.append(f"{count:,} {text}" + f" ({', '.join(details[kind])})" * bool(details[kind]))
    return ", ".join(parts)
