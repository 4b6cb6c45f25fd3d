"""What a data set was understood to be, in a few lines: classes, splits, and what is left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctf.data.image_set import Splits
from ctf.data.sources.base import ImageSource

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
    left_out = _left_out(images)
    lines = [
        _contents(images.train.class_names, class_counts(images), left_out, images.unit, full),
        f"{len(images.train):,} to train on, {len(images.val):,} held out",
        *images.understood,
    ]
    if untrained := untrained_classes(images):
        lines.append(f"never trained on, as all images are held out: {_some(untrained, full)}")
    if full:
        lines += _names_left_out(left_out)
    if images.skipped:
        unusable = [f"{bad.name} ({bad.reason})" for bad in images.skipped]
        lines.append(f"unusable: {_some(unusable, full)}")
    return "\n".join(lines)


def summarize_source(source: ImageSource, *, full: bool = False) -> str:
    """Return the same for a source whose images are not split and have not been read."""
    counts = np.bincount(source.classes_N, minlength=len(source.class_names)).tolist()
    lines = [_contents(source.class_names, counts, source.left_out, source.unit, full)]
    return "\n".join(
        [*lines, *source.understood, *(_names_left_out(source.left_out) if full else ())]
    )


def to_json(images: Splits) -> dict[str, Any]:
    """Return the same as plain values: numbers of images of each class, and left out by reason."""
    return {
        "options": dict(images.options),
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


def _contents(
    class_names: Sequence[str],
    counts: Sequence[int],
    left_out: Mapping[str, Sequence[str]],
    unit: str,
    full: bool,
) -> str:
    classes = [f"{name} ({count:,})" for name, count in zip(class_names, counts, strict=True)]
    text = f"{sum(counts):,} images in {_classes(classes, counts, full)}"
    if number := sum(map(len, left_out.values())):
        text += f"; {number:,} {unit}{'s' * (number != 1)} left out: {describe_left_out(left_out)}"
    return text


def _names_left_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"left out, {reason}: {', '.join(names)}" for reason, names in left_out.items()]


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
    for reason, names in sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0])):
        kind, _, detail = reason.removesuffix(")").partition(" (")
        counts[kind] += len(names)
        details[kind] += [detail] * bool(detail)
    parts = []
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        text = PLURALS.get(kind, kind) if count != 1 else kind
        text = "in " * kind.startswith("split ") + text
        parts.append(f"{count:,} {text}" + f" ({', '.join(details[kind])})" * bool(details[kind]))
    return ", ".join(parts)
