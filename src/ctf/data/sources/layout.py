"""Where the classes and the splits of a source are, by the paths of its images.

A source is a folder, or a .tar file of one. Understood are, also inside folders that hold nothing
else:

    cat/1.png  dog/2.png               a folder for each class
    train/cat/1.png  val/cat/2.png     a folder for each split
    cat/train/1.png  cat/val/2.png     folders for the splits of each class
    images/cat/1.png  masks/cat/1.png  images beside masks or labels, which are left out
    1.png  2.png                       one class

`classes_at_depth` says where the classes are if that cannot be told.
"""

from __future__ import annotations

import os.path
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctf.common.errors import UserError
from ctf.data.sources.base import TRAIN, VAL, LooseImagesError, natural_order

MAX_DEPTH = 32  # of the folders that are told apart
TEST = 2  # a split that is left out
SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
    **dict.fromkeys(("test", "testing", "eval", "pred", "unlabeled", "unlabelled"), TEST),
}
# Names of folders of images, and of folders beside them that hold something else, maybe as images.
IMAGES = {"image", "images", "img", "imgs", "jpegimages", "photos", "pictures"}
LABELS = {
    "annotation", "annotations", "depth", "depths", "ground_truth", "groundtruth", "gt", "label",
    "labels", "mask", "masks", "segmentation", "segmentations", "segmentationclass",
    "segmentationobject", "trimaps",
}  # fmt: skip


class Layout(NamedTuple):
    """How the images of a source are read.

    Attributes:
        base: the folder that all used images are in, such as "animals/"; "" if there is none.
        rows_N: numbers of the used images, ascending.
        class_names: in natural order.
        classes_N: class number of each used image.
        splits_N: see `ImageSource`.
        understood: see `ImageSource`.
        left_out: see `ImageSource`.
    """

    base: str
    rows_N: NDArray[np.int64]
    class_names: tuple[str, ...]
    classes_N: NDArray[np.int64]
    splits_N: NDArray[np.int8] | None
    understood: tuple[str, ...]
    left_out: dict[str, list[str]]


def read_layout(
    path: Path,
    title: str,
    names: Sequence[str],
    classes_at_depth: int | None = None,
    empty_folders: Iterable[str] = (),
) -> Layout:
    """Find out which images are of which class and split.

    Args:
        path: where the source is, for messages.
        title: its name, and that of the class if there are no folders of classes.
        names: path of each image in the source, with "/" between folders.
        classes_at_depth: 1 if the folders in the source are the classes, 2 if the folders in these
            are, ...; 0 if all images are of one class; None to find out.
        empty_folders: paths of folders that should hold images; beside folders of classes they are
            classes, too.

    Raises:
        UserError: images are outside the folders of classes, or it cannot be told what these are.
    """
    rows_by_folder: dict[str, list[int]] = {folder: [] for folder in empty_folders}
    for row, name in enumerate(names):
        rows_by_folder.setdefault(name.rpartition("/")[0], []).append(row)
    root = _Folder("")
    for folder in natural_order(rows_by_folder):
        root.add(folder, rows_by_folder[folder])
    reader = _Reader(path, title, names)
    if classes_at_depth is None:
        reader.find_classes(root)
    else:
        reader.take_classes(root, classes_at_depth)
    return reader.layout()


class _Folder:
    """A folder: the numbers of the images in it, and its folders by name."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = path.rpartition("/")[2]
        self.rows: list[int] = []
        self.folders: dict[str, _Folder] = {}
        self.has_images = False  # in it, or in any folder below

    def add(self, path: str, rows: Sequence[int]) -> None:
        """Add the images of the folder with that path below this one; there may be none."""
        folder = self
        folder.has_images |= bool(rows)
        for name in path.split("/")[:MAX_DEPTH] if path else ():
            if name not in folder.folders:
                folder.folders[name] = _Folder(f"{folder.path}/{name}".removeprefix("/"))
            folder = folder.folders[name]
            folder.has_images |= bool(rows)
        folder.rows.extend(rows)

    def inner(self) -> list[_Folder]:
        """Return its folders that have images."""
        return [folder for folder in self.folders.values() if folder.has_images]

    def all_rows(self) -> list[int]:
        """Return the numbers of all images in it and in the folders below."""
        return [*self.rows, *(row for inner in self.folders.values() for row in inner.all_rows())]


class _Split(NamedTuple):
    """A split, and the name of the folder that says so; "" if there are no splits."""

    kind: int  # TRAIN, VAL or TEST
    folder: str


class _Images(NamedTuple):
    """Images of one class and split."""

    rows: list[int]
    class_name: str | None  # None if there are no folders of classes
    split: _Split
    parent: str  # path of the folder that the folder of the class is in


NO_SPLITS = _Split(TRAIN, "")


class _Reader:
    """Collects the images of each class and split, and what is left out."""

    def __init__(self, path: Path, title: str, names: Sequence[str]) -> None:
        self.path, self.title, self.names = path, title, names
        self.only_class = title  # name of the class if there are no folders of classes
        self.images: list[_Images] = []
        self.left_out: dict[str, list[str]] = defaultdict(list)

    def leave_out(self, reason: str, rows: Sequence[int]) -> None:
        """Note why images are not used."""
        if rows:
            self.left_out[reason] += (self.names[row] for row in rows)

    # --- To find out where the classes are --------------------------------------------------------

    def find_classes(self, root: _Folder) -> None:
        """Collect the images of a source."""
        top = self.unwrap(root)
        splits = self.find_splits(top)
        if splits is None:
            self.add_classes(top, NO_SPLITS)
            return
        if top.name and top.name.lower() not in IMAGES:  # cat/train/1.png is of class cat
            self.only_class = top.name
        for folder, split in sorted(splits.items(), key=lambda item: item[1].kind):  # train first
            classes = {images.class_name for images in self.images}
            self.add_classes(self.unwrap(folder, classes), split)

    def unwrap(self, folder: _Folder, classes: Collection[str | None] = ()) -> _Folder:
        """Go down while a folder holds only one, unless that is a folder of images or a class."""
        while True:
            self.drop_labels(folder)
            inner = folder.inner()
            if folder.rows or len(inner) != 1 or inner[0].rows or inner[0].name in classes:
                return folder
            folder = inner[0]

    def drop_labels(self, folder: _Folder) -> None:
        """Leave out folders of masks and the like beside folders of images or of splits."""
        labels = [name for name in folder.folders if name.lower() in LABELS]
        others = [inner.name.lower() for inner in folder.inner() if inner.name not in labels]
        if others and all(name in IMAGES or name in SPLITS for name in others):
            for name in labels:
                self.leave_out(f"in a folder {name}", folder.folders.pop(name).all_rows())

    def find_splits(self, folder: _Folder) -> Mapping[_Folder, _Split] | None:
        """Return the folders in a folder with the split of each; None if they are no splits.

        Raises:
            UserError: that cannot be told.
        """
        if folder.rows:
            return None
        inner = folder.inner()
        found = [parse_split(each.name) for each in inner]
        known = [split for split in found if split is not None]
        kinds, rests = {kind for kind, _ in known}, {rest for _, rest in known}
        all_known = len(known) == len(found)
        if all_known and len(rests) == 1 and TRAIN in kinds and len(kinds) > 1:
            return {f: _Split(kind, f.name) for f, (kind, _) in zip(inner, known, strict=True)}
        plain = {kind for kind, rest in known if not rest}
        if len(plain) > 1 or (all_known and len(kinds) > 1):
            folders = ", ".join(each.name for each in inner)
            depth = len(Path(folder.path).parts) + 1
            raise UserError(
                f"{self.path / folder.path}: are these folders classes or splits: {folders}? Pass "
                f"--classes-at-depth {depth} if they are the classes, {depth + 1} if these are in "
                "them, or the path of one folder"
            )
        return None

    def add_classes(self, folder: _Folder, split: _Split) -> None:
        """Collect the images in a folder that holds folders of classes, or only images."""
        inner = folder.inner()
        if not inner:
            self.images.append(_Images(folder.rows, None, split, folder.path))
            return
        if folder.rows:
            raise LooseImagesError(self.path, [self.names[row] for row in folder.rows])
        for each in inner:
            self.drop_labels(each)
        splits = [self.find_splits(each) if split == NO_SPLITS else None for each in inner]
        for each, own_splits in zip(inner, splits, strict=True):
            if own_splits is None or None in splits:
                self.images.append(_Images(each.all_rows(), each.name, split, folder.path))
                continue
            for part, own_split in own_splits.items():
                self.images.append(_Images(part.all_rows(), each.name, own_split, folder.path))
        self.add_empty(folder, split)

    def add_empty(self, folder: _Folder, split: _Split) -> None:
        """Collect the folders without images, which are mistakes, as classes."""
        for each in folder.folders.values():
            if not each.has_images:
                self.images.append(_Images([], each.name, split, folder.path))

    # --- By a depth -------------------------------------------------------------------------------

    def take_classes(self, root: _Folder, depth: int) -> None:
        """Collect the images whose classes are the folders at a depth.

        Folders of splits above are those of the first level at which one is for training, and
        another is not.

        Raises:
            UserError: images are less deep.
        """
        if depth < 0:
            raise UserError(f"classes_at_depth: got {depth}, expected 0 or more")
        level, outside, splits_found = {root: NO_SPLITS}, [], False
        for _ in range(depth - 1):
            outside += [row for folder in level for row in folder.rows]
            below = {each: split for folder, split in level.items() for each in folder.inner()}
            found = {each: parse_split(each.name) or (TRAIN, "") for each in below}
            kinds = {kind for kind, rest in found.values() if not rest}
            if not splits_found and TRAIN in kinds and len(kinds) > 1:
                splits_found = True
                below = {each: _Split(kind, each.name) for each, (kind, _) in found.items()}
            level = below
        for folder, split in level.items():
            if depth == 0:
                self.images.append(_Images(folder.all_rows(), None, split, folder.path))
                continue
            outside += folder.rows
            for each in folder.inner():
                self.images.append(_Images(each.all_rows(), each.name, split, folder.path))
            self.add_empty(folder, split)
        if outside:
            raise UserError(
                f"{self.path}: images less than --classes-at-depth {depth} folders deep "
                f"({len(outside)}, e.g. {self.names[outside[0]]})"
            )

    # --- The result -------------------------------------------------------------------------------

    def layout(self) -> Layout:
        """Put together what was collected."""
        train = [images for images in self.images if images.split.kind == TRAIN]
        class_names = natural_order({images.class_name or self.only_class for images in train})
        number = {name: i for i, name in enumerate(class_names)}
        has_classes = any(images.class_name is not None for images in train)
        used = []
        for images in self.images:
            kind, folder = images.split
            name = images.class_name if has_classes else self.only_class
            if kind == TEST:
                self.leave_out(f"split {folder}", images.rows)
            elif name is None:
                self.leave_out(f"split {folder}, without folders of classes", images.rows)
            elif name not in number:
                self.leave_out(f"split {folder}, of classes that are not in train", images.rows)
            else:
                used.append((images, number[name]))
        rows_N = np.array([row for images, _ in used for row in images.rows], np.int64)
        classes_N = np.repeat([c for _, c in used], [len(images.rows) for images, _ in used])
        splits_N = np.repeat([i.split.kind for i, _ in used], [len(i.rows) for i, _ in used])
        order_N = np.argsort(rows_N)
        base = _common_folder({images.parent for images, _ in used})
        return Layout(
            base=base,
            rows_N=rows_N[order_N],
            class_names=tuple(class_names),
            classes_N=classes_N[order_N].astype(np.int64),
            splits_N=splits_N[order_N].astype(np.int8) if (splits_N == VAL).any() else None,
            understood=tuple(self.describe(base, [images for images, _ in used])),
            left_out=dict(self.left_out),
        )

    def describe(self, base: str, used: Sequence[_Images]) -> Iterator[str]:
        """Yield the lines of `ImageSource.understood`."""

        def folders(images: Iterable[_Images], kind: int | None = None) -> set[str]:
            return {i.split.folder for i in images if kind in (None, i.split.kind)}

        train, val = folders(used, TRAIN), folders(used, VAL)
        uses = {
            "to train on": train,
            "held out": val,
            "left out": folders(self.images) - train - val,
        }
        if len(folders(self.images)) > 1:
            listed = (
                f"{', '.join(natural_order(names))} {use}" for use, names in uses.items() if names
            )
            yield f"splits: {', '.join(listed)}"
        classes = {i.class_name for i in used if i.split.kind == TRAIN}
        kind = "one class: no folders in" if classes <= {None} else "classes: the folders in"
        yield f"{kind} {self.title}/{base}"
        for folder in natural_order(folders(self.images) - train):
            others = {i.class_name for i in self.images if i.split.folder == folder} - classes
            if named := natural_order(n for n in others if n is not None and n != folder):
                yield f"classes only in {folder}, and not used: {', '.join(named)}"


def parse_split(name: str) -> tuple[int, tuple[str, ...]] | None:
    """Return the split that a folder's name stands for, and the other words in the name.

    "seg_train" is TRAIN and ("seg",); "val2017" is VAL and (); "cat" is None.
    """
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
    kinds = [SPLITS[word] for word in words if word in SPLITS]
    if len(kinds) != 1:
        return None
    return kinds[0], tuple(word for word in words if word not in SPLITS)


def _common_folder(paths: Collection[str]) -> str:
    """Return the folder that all paths are in, with "/" at its end; "" if there is none."""
    common = os.path.commonpath(["/", *(f"/{path}" for path in paths)][bool(paths) :])
    return common.strip("/") + "/" * (common != "/")
