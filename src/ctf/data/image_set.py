"""Labelled images of one size, read by their number, and the two splits of a data set.

Shape suffixes: B images of a batch, N images of a set, S = image_size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctf.common import storage
from ctf.data.decode import WHITE
from ctf.data.transforms import PLAIN, View


@dataclass(eq=False, repr=False)
class ImageSet(ABC):
    """N labelled images of one size.

    Attributes:
        name: name of the data set.
        class_names: name of each class, by class number.
        classes_N: class number of each image, int64.
        image_size: side S in pixels of the images that `read` returns.
        fingerprint: SHA-256 (hex) that changes whenever `read` could return something else. For
            files it covers the bytes, the relative path and the class of each, the image size and
            the background, but no times: a copy of the files has the same fingerprint.
        mirrors: whether mirrored images are as plausible as the originals.
        background: RGB colour behind transparent pixels.
    """

    name: str
    class_names: tuple[str, ...]
    classes_N: NDArray[np.int64]
    image_size: int
    fingerprint: str
    mirrors = True
    background = WHITE

    def __len__(self) -> int:
        return len(self.classes_N)

    @abstractmethod
    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """Read images by their numbers.

        Args:
            indices: image numbers, (B,).
            view: the crop to take of each.

        Returns:
            RGB pixels in 0..255, (B, S, S, 3).

        Raises:
            UserError: a file was damaged or removed after the set was opened.
        """

    def image_name(self, index: int) -> str:
        """Return the name of an image for people: of files, that in the source; else its number."""
        return f"{index}"

    def read_views(self, indices: ArrayLike, views: Sequence[View]) -> Iterator[NDArray[np.uint8]]:
        """Yield `read` for each view; a set of files decodes each file once for all views."""
        for view in views:
            yield self.read(indices, view)


@dataclass(frozen=True)
class BadImage:
    """An image that was left out: its name, relative to the source, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Splits:
    """Training and held-out images, and how they were found; see `summary.summarize`.

    Attributes:
        train: images to train on.
        val: held-out images.
        skipped: what `skip_bad` left out of both.
        understood: how the source was read, a line each; see `ImageSource`.
        left_out: names of files that are not used, although nothing is wrong with them, by reason.
        unit: what each name in `left_out` stands for.
        options: which of `open_images` said how to read the source; by default it is found out.
        earlier: open the same images with their classes in the order of earlier versions, which
            sorted them as text, "class10" before "class2".
    """

    train: ImageSet
    val: ImageSet
    skipped: tuple[BadImage, ...] = ()
    understood: tuple[str, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    unit: str = "file"
    options: Mapping[str, int | str] = field(default_factory=dict)
    earlier: tuple[Callable[[], Splits], ...] = field(default=(), repr=False)

    def as_recorded(
        self, fingerprint: str | None = None, class_names: Sequence[str] | None = None
    ) -> Splits:
        """Return the images with their classes in the order of something that was made of them.

        Args:
            fingerprint: of the training images.
            class_names: in that order.

        Returns:
            The images as they are if they are not these images in the order of earlier versions.
        """

        def matches(train: ImageSet) -> bool:
            return fingerprint in (None, train.fingerprint) and (
                class_names is None or [*class_names] == [*train.class_names]
            )

        if not matches(self.train):
            for open_earlier in self.earlier:
                if matches((images := open_earlier()).train):
                    return replace(images, options=self.options)
        return self

    def as_recorded_in(self, path: Path, *keys: str) -> Splits:
        """Return the same by the fingerprint below these keys in a JSON file, if there is one."""
        if not self.earlier or not path.is_file():
            return self
        content = storage.load_json(path)
        for key in keys:
            content = content.get(key) if isinstance(content, dict) else None
        return self.as_recorded(content if isinstance(content, str) else None)
