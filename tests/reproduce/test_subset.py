"""Images that are split off a set."""

from pathlib import Path

import numpy as np
import pytest

from ctf.data.images import open_images
from ctf.data.transforms import View
from ctf.reproduce.subset import split_off


def test_some_images_are_split_off(image_folder: Path) -> None:
    everything = open_images(str(image_folder), 16).train
    rest, some = split_off(everything, 3)
    assert len(some) == 3 and len(rest) == len(everything) - 3
    spread = [0, len(everything) // 3, 2 * len(everything) // 3]
    left = [row for row in range(len(everything)) if row not in spread]
    for part, rows in ((some, spread), (rest, left)):
        assert np.array_equal(part.classes_N, everything.classes_N[rows])
        assert part.class_names == everything.class_names and part.mirrors == everything.mirrors
        assert np.array_equal(part.read([2, 0]), everything.read([rows[2], rows[0]]))
        views = (View(), View(flip=True))
        for one, other in zip(
            part.read_views([1, 2], views), everything.read_views(rows[1:3], views), strict=True
        ):
            assert np.array_equal(one, other)
    assert len({everything.fingerprint, rest.fingerprint, some.fingerprint}) == 3
    assert split_off(everything, 3)[1].fingerprint == some.fingerprint


def test_neither_part_is_empty(image_folder: Path) -> None:
    everything = open_images(str(image_folder), 16).train
    for count in (0, len(everything)):
        with pytest.raises(ValueError, match=f"{count} of {len(everything)} images"):
            split_off(everything, count)
