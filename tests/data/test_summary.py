"""What is said about a data set before it is used."""

from pathlib import Path

from ctf.data.image_set import Splits
from ctf.data.images import open_images
from ctf.data.summary import describe_left_out, summarize, to_json
from tests.data.helpers import RGB, save
from tests.data.tiny_tokens import Noise


def test_classes_and_what_is_left_out_are_told(damaged_folder: Path) -> None:
    (damaged_folder / "b" / "Thumbs.db").write_bytes(b"\0")
    splits = open_images(damaged_folder, 16, skip_bad=True)
    train, val = len(splits.train), len(splits.val)
    first, *more = summarize(splits).split("\n")
    assert first == (
        "24 images in 2 classes: a (12), b (12); 9 files left out: "
        "3 unreadable, 3 not images (.csv, .db, .txt), 2 hidden, 1 too small"
    )
    unreadable = "corrupt, truncated or of an unknown format"
    assert more == [
        f"{train} to train on, {val} held out",
        "classes: the folders in images/",
        f"unusable: a/cut.jpg ({unreadable}), a/text.png ({unreadable}), "
        f"b/empty.gif ({unreadable}), b/small.png (12x9, smaller than --image-size 16)",
    ]
    assert "left out, not an image (.db): b/Thumbs.db" in summarize(splits, full=True).split("\n")
    assert to_json(splits) == {
        "train": train,
        "val": val,
        "classes": {"a": 12, "b": 12},
        "understood": ["classes: the folders in images/"],
        "options": {},
        "left_out": {
            "hidden": 2, "not an image (.csv)": 1, "not an image (.db)": 1,
            "not an image (.txt)": 1, "unreadable": 3, "too small": 1,
        },
    }  # fmt: skip


def classes(count: int) -> Splits:
    images = Noise(count, seed=0, classes=count)
    return Splits(images, images)


def test_many_classes_are_shortened_but_in_full() -> None:
    names = [f"{name} (2)" for name in classes(1000).train.class_names]
    short, full = summarize(classes(1000)), summarize(classes(1000), full=True)
    assert short.split("\n")[0] == (
        f"2,000 images in 1,000 classes, of 2 to 2 each: {', '.join(names[:8])}, ..., {names[-1]}"
    )
    assert full.split("\n")[0] == f"2,000 images in 1,000 classes: {', '.join(names)}"
    assert summarize(classes(10)) == summarize(classes(10), full=True)


def test_a_class_whose_only_image_is_held_out_is_told(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        save(tmp_path / name / "1.png", RGB)
    splits = open_images(tmp_path, 16)
    (held_out,) = splits.val.classes_N.tolist()
    name = splits.val.class_names[held_out]
    assert f"never trained on, as all images are held out: {name}" in summarize(splits)
    save(tmp_path / name / "2.png", RGB)  # with two images, one of them stays
    assert "never trained on" not in summarize(open_images(tmp_path, 16))


def test_reasons_are_counted_by_kind() -> None:
    left_out = {
        "not an image (.txt)": ["a", "b"], "not an image (.db)": ["c"], "split test": ["d"] * 1200,
        "hidden": ["e"],
    }  # fmt: skip
    assert describe_left_out(left_out) == (
        "1,200 in split test, 3 not images (.txt, .db), 1 hidden"
    )
    assert describe_left_out({"not an image (.txt)": ["a"]}) == "1 not an image (.txt)"
    assert describe_left_out({}) == ""
