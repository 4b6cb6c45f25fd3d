"""Splits of files that hold many images each, by their names: train-00.tar, validation-00.tar.

Shape suffixes: F files, N images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ctf.data.sources.base import TRAIN, VAL
from ctf.data.sources.layout import TEST, Layout, parse_split

SPLIT_NAMES = {TRAIN: "train", VAL: "val", TEST: "test"}


def splits_of_names(names: Sequence[str]) -> tuple[NDArray[np.int8] | None, list[str]]:
    """Find the splits of files or folders, which are understood if there is `train` and another.

    Args:
        names: their paths.

    Returns:
        TRAIN, VAL or TEST of each, (F,), or None if they are not splits; and what was understood.
    """
    parsed = [parse_split(name.rpartition("/")[2]) or parse_split(name) for name in names]
    kinds = [None if split is None else split[0] for split in parsed]
    if TRAIN not in kinds or not {VAL, TEST} & {*kinds}:
        return None, []
    by_kind = {
        kind: [name for name, other in zip(names, kinds, strict=True) if other == kind]
        for kind in (*SPLIT_NAMES, None)
    }
    parts = [
        f"{_some(by_kind[kind])} ({name})" for kind, name in SPLIT_NAMES.items() if by_kind[kind]
    ]
    if unclear := by_kind[None]:
        parts.append(f"{_some(unclear)} (train, since not named as a split)")
    return (
        np.array([TRAIN if kind is None else kind for kind in kinds], np.int8),
        [f"splits by name: {', '.join(parts)}"],
    )


def splits_of_folders(folders: Sequence[str]) -> tuple[NDArray[np.int8] | None, list[str]]:
    """Find the split of each image by its folder, (N,), as `splits_of_names` does."""
    distinct = sorted({*folders})
    splits, lines = splits_of_names(distinct)
    if splits is None:
        return None, []
    by_folder = dict(zip(distinct, splits.tolist(), strict=True))
    return np.array([by_folder[folder] for folder in folders], np.int8), lines


def use_splits(
    names: Sequence[str],
    class_names: tuple[str, ...],
    classes_N: NDArray[np.int64],
    splits_N: NDArray[np.int8] | None,
) -> Layout:
    """Leave out images for tests, and those held out whose class has no images to train on.

    Args:
        names: name of each image.
        class_names: name of each class.
        classes_N: class of each image, -1 if it has none.
        splits_N: TRAIN, VAL or TEST of each image; None if there are no splits.
    """
    if splits_N is None:
        return Layout("", np.arange(len(names)), class_names, classes_N, None, (), {})
    is_test_N = splits_N == TEST
    trained = np.unique(classes_N[(splits_N == TRAIN) & (classes_N >= 0)])
    is_new_N = ~is_test_N & (classes_N >= 0) & ~np.isin(classes_N, trained)
    left_out = {
        reason: [names[row] for row in np.flatnonzero(left_out_N).tolist()]
        for reason, left_out_N in (
            ("split test", is_test_N),
            ("split val, of a class without images to train on", is_new_N),
        )
        if left_out_N.any()
    }
    rows_N = np.flatnonzero(~is_test_N & ~is_new_N)
    numbers = np.full(len(class_names) + 1, -1)  # the last one is that of -1
    numbers[trained] = np.arange(len(trained))
    splits_N = splits_N[rows_N]
    return Layout(
        "",
        rows_N,
        tuple(class_names[c] for c in trained.tolist()),
        numbers[classes_N[rows_N]],
        splits_N if (splits_N == VAL).any() else None,
        (),
        left_out,
    )


def join_left_out(*parts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return all names that were left out, by the reason."""
    joined: defaultdict[str, list[str]] = defaultdict(list)
    for by_reason in parts:
        for reason, names in by_reason.items():
            joined[reason] += names
    return dict(joined)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
