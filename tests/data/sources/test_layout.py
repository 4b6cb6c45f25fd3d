"""Where the classes and splits are, by the paths of images alone."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctf.common.errors import UserError
from ctf.data.sources.base import natural_order
from ctf.data.sources.layout import Layout, read_layout

ROOT = Path("sets/pets")


def read(paths: str, depth: int | None = None, **options: object) -> Layout:
    return read_layout(ROOT, "pets", paths.split(), depth, **options)  # type: ignore[arg-type]


def used(paths: str, depth: int | None = None) -> dict[str, str]:
    """The class of each image below the base that is used, with "*" if it is held out."""
    layout, names = read(paths, depth), paths.split()
    held_out = np.zeros(len(layout.rows_N)) if layout.splits_N is None else layout.splits_N
    return {
        names[row].removeprefix(layout.base): layout.class_names[c] + "*" * int(out)
        for row, c, out in zip(layout.rows_N, layout.classes_N, held_out, strict=True)
    }


@pytest.mark.parametrize(
    ("paths", "base", "expected"),
    [
        ("cat/1 dog/2 dog/more/3", "", {"cat/1": "cat", "dog/2": "dog", "dog/more/3": "dog"}),
        ("animals/cat/1 animals/dog/2", "animals/", {"cat/1": "cat", "dog/2": "dog"}),
        ("a/b/c/cat/1 a/b/c/dog/2", "a/b/c/", {"cat/1": "cat", "dog/2": "dog"}),
        ("cat/1 cat/more/2", "", {"cat/1": "cat", "cat/more/2": "cat"}),
        ("1 2", "", {"1": "pets", "2": "pets"}),
        ("images/cat/1 labels/cat/1", "images/", {"cat/1": "cat"}),
        ("bus/1 car/1 train/1", "", {"bus/1": "bus", "car/1": "car", "train/1": "train"}),
    ],
)
def test_classes_are_found(paths: str, base: str, expected: dict[str, str]) -> None:
    assert read(paths).base == base
    assert read(paths).splits_N is None
    assert used(paths) == expected


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("train/cat/1 val/cat/2", {"train/cat/1": "cat", "val/cat/2": "cat*"}),
        ("Training/cat/1 VALID/cat/2", {"Training/cat/1": "cat", "VALID/cat/2": "cat*"}),
        ("x/train/cat/1 x/dev/cat/2", {"train/cat/1": "cat", "dev/cat/2": "cat*"}),
        ("train2017/1 val2017/2", {"train2017/1": "pets", "val2017/2": "pets*"}),
        ("images/train/1 images/val/2", {"train/1": "pets", "val/2": "pets*"}),
        ("cat/train/1 cat/val/2", {"train/1": "cat", "val/2": "cat*"}),
        ("train/cat/1 train/dog/1 test/cat/2", {"cat/1": "cat", "dog/1": "dog"}),
        ("seg_train/seg_train/cat/1 seg_test/seg_test/cat/2 seg_pred/3", {"cat/1": "cat"}),
        ("cat/train/1 cat/val/2 dog/train/3 dog/test/4",
         {"cat/train/1": "cat", "cat/val/2": "cat*", "dog/train/3": "dog"}),
        ("images/train/cat/1 images/val/cat/2 labels/train/cat/1",
         {"train/cat/1": "cat", "val/cat/2": "cat*"}),
        ("train/images/cat/1 valid/images/cat/2 train/masks/cat/1",
         {"train/images/cat/1": "cat", "valid/images/cat/2": "cat*"}),
        # A class need not have a folder for itself to be one: val has only one class here.
        ("train/cat/1 train/dog/2 val/cat/more/3",
         {"train/cat/1": "cat", "train/dog/2": "dog", "val/cat/more/3": "cat*"}),
    ],
)  # fmt: skip
def test_splits_are_found(paths: str, expected: dict[str, str]) -> None:
    assert used(paths) == expected


def test_what_is_left_out_is_told() -> None:
    layout = read("train/cat/1 val/cat/2 val/owl/3 test/cat/4 test/elk/5 masks/6")
    assert layout.class_names == ("cat",)
    assert layout.left_out == {
        "in a folder masks": ["masks/6"],
        "split val, of classes that are not in train": ["val/owl/3"],
        "split test": ["test/cat/4", "test/elk/5"],
    }
    assert layout.understood == (
        "splits: train to train on, val held out, test left out",
        "classes: the folders in pets/",
        "classes only in test, and not used: elk",
        "classes only in val, and not used: owl",
    )
    flat = read("train/cat/1 train/dog/2 val/3")
    assert flat.left_out == {"split val, without folders of classes": ["val/3"]}
    assert flat.understood[0] == "splits: train to train on, val left out"
    assert read("1 2").understood == ("one class: no folders in pets/",)


@pytest.mark.parametrize(
    ("paths", "question"),
    [
        ("train/cat/1 test/cat/2 more/cat/3", "splits: more, test, train? Pass "),
        ("x/train/1 x/test/2 x/more/3", "Pass --classes-at-depth 2 if they are the classes, 3 if"),
        ("val/cat/1 test/cat/2", "splits: test, val?"),
        ("trainA/1 trainB/2 testA/3 testB/4", "splits: testA, testB, trainA, trainB?"),
        ("cat/1 2", "images outside the class folders (1, e.g. 2)"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_asked(paths: str, question: str) -> None:
    with pytest.raises(UserError, match=re.escape(question)):
        read(paths)


@pytest.mark.parametrize(
    ("paths", "depth", "expected"),
    [
        ("m/cat/1 m/dog/2 b/owl/3", 1, {"m/cat/1": "m", "m/dog/2": "m", "b/owl/3": "b"}),
        ("m/cat/1 m/dog/2 b/owl/3", 2, {"m/cat/1": "cat", "m/dog/2": "dog", "b/owl/3": "owl"}),
        ("m/cat/1 4", 0, {"m/cat/1": "pets", "4": "pets"}),
        ("animals/cat/1", 1, {"animals/cat/1": "animals"}),
        ("animals/cat/1", 2, {"cat/1": "cat"}),
        ("train/1 test/2", 1, {"train/1": "train", "test/2": "test"}),
        ("train/cat/1 test/cat/2 more/cat/3", 2, {"train/cat/1": "cat", "more/cat/3": "cat"}),
        ("a/train/cat/1 b/train/cat/2 b/val/cat/3", 3,
         {"a/train/cat/1": "cat", "b/train/cat/2": "cat", "b/val/cat/3": "cat*"}),
    ],
)  # fmt: skip
def test_a_depth_says_where_the_classes_are(
    paths: str, depth: int, expected: dict[str, str]
) -> None:
    assert used(paths, depth) == expected


def test_images_less_deep_are_refused() -> None:
    with pytest.raises(UserError, match=r"less than --classes-at-depth 2 folders deep \(2, e.g. "):
        read("1 cat/2 m/dog/3", 2)
    with pytest.raises(UserError, match="classes_at_depth: got -1, expected 0 or more"):
        read("cat/1", -1)


def test_empty_folders_beside_classes_are_classes() -> None:
    assert read("cat/1", empty_folders=["owl", "cat/more"]).class_names == ("cat", "owl")
    assert read("animals/cat/1 animals/dog/2", empty_folders=["out"]).class_names == ("cat", "dog")
    assert read("train/cat/1 val/cat/2", empty_folders=["val/dog"]).class_names == ("cat",)
    assert read("m/cat/1", 2, empty_folders=["m/dog"]).class_names == ("cat", "dog")


def test_very_deep_folders_are_no_problem() -> None:
    deep = "/".join("x" * 5000)
    assert len(read(f"cat/{deep}/1 dog/2").rows_N) == 2
    assert len(read(f"{deep}/1").rows_N) == 1


def test_numbers_in_names_are_sorted_by_value() -> None:
    names = ["10", "2", "b10", "b9", "b", "B", "07", "7", "b1x10", "b1x9", "é2", "é10", "9" * 5000]
    assert natural_order(names) == [
        "2", "07", "7", "10", "9" * 5000, "B", "b", "b1x9", "b1x10", "b9", "b10", "é2", "é10",
    ]  # fmt: skip


@given(st.lists(st.text("ab01.- ٣²", max_size=6), unique=True))
def test_the_natural_order_is_one_order(names: list[str]) -> None:
    ordered = natural_order(names)
    assert sorted(ordered) == sorted(names)
    assert natural_order(ordered[::-1]) == ordered
    for a, b in itertools.pairwise(ordered):
        assert natural_order([b, a]) == [a, b]
