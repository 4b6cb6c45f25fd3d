"""Images to score, and to score against: folders, image sets; and invalid ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.imagenet import imagenet_classes
from ctf.data.images import open_images
from ctf.evaluation.image_collection import BATCH, ImageCollection
from ctf.evaluation.reference_sets import open_reference, open_samples
from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline
from tests.evaluation.helpers import check_refused, noise, read, read_samples

PIXELS = noise(150, 0)[:, :, :6]  # more than two batches, taller than wide


def save_folder(root: Path, names: list[str], pixels: np.ndarray = PIXELS) -> Path:
    for name, image in zip(names, pixels, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def test_a_folder_is_sorted_by_name(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(150)]
    opened = open_samples(save_folder(tmp_path / "a", names))
    assert (opened.name, opened.count, opened.size) == ("a", 150, (8, 6))
    assert opened.classes_N is None and opened.class_names is None
    assert np.array_equal(read(opened), PIXELS)
    copy = open_samples(save_folder(tmp_path / "b", names))
    assert copy.fingerprint == opened.fingerprint
    Image.fromarray(PIXELS[1]).save(tmp_path / "b" / "000.png")
    assert open_samples(tmp_path / "b").fingerprint != opened.fingerprint
    (tmp_path / "b" / "000.png").rename(tmp_path / "b" / "200.png")
    assert np.array_equal(read_samples(tmp_path / "b")[-1], PIXELS[1])


def test_subfolders_are_classes(tmp_path: Path) -> None:
    names = ["b/0.png", "b/deep/1.png", "a/2.bmp", "c c/3.png"]
    root = save_folder(tmp_path, [*names, ".hidden/4.png", "a/._5.png"])
    (root / "notes.txt").write_text("not an image")
    opened = open_samples(root)
    assert opened.class_names == ("a", "b", "c c") and opened.classes_N is not None
    assert opened.classes_N.tolist() == [0, 1, 1, 2]
    assert np.array_equal(read(opened), PIXELS[[2, 0, 1, 3]])
    save_folder(root, ["loose.png"])
    assert open_samples(root).classes_N is None


def test_imagenet_folders_get_class_names(tmp_path: Path) -> None:
    known = imagenet_classes()
    numbers = list(known)[5:7]
    opened = open_samples(save_folder(tmp_path, [f"{number}/0.png" for number in numbers]))
    assert opened.class_names == tuple(known[number] for number in numbers)


def test_folders_of_ctf_sample_have_classes(pipe: Pipeline, tmp_path: Path) -> None:
    root = tmp_path / "samples"
    export.write(pipe, root, export.Settings((2, 0), 3, 0, pipe.sampling))
    opened = open_samples(root)
    assert opened.count == 6 and opened.classes_N is not None and opened.class_names is None
    assert opened.classes_N.tolist() == [2, 2, 2, 0, 0, 0]
    sample = pipe.sample(["red"], 0).images[0]
    assert np.array_equal(read(opened)[0], np.asarray(sample))
    (root / "000002.png").unlink()
    assert open_samples(root).classes_N is None  # numbers no longer match
    (root / "codes.npz").write_bytes(b"PK")
    assert open_samples(root).count == 5


def test_mixed_sizes_are_refused_by_their_headers(tmp_path: Path) -> None:
    """Before anything is decoded: the last file has another size, and only a header."""
    root = save_folder(tmp_path, [f"{i}.png" for i in range(9)])
    Image.fromarray(noise(1, 2, 40)[0]).save(root / "9.png")
    (root / "9.png").write_bytes((root / "9.png").read_bytes()[:60])
    with pytest.raises(UserError) as error:
        open_samples(root)
    assert str(error.value) == (
        f"{root / '9.png'}: 40 x 40 pixels, but 0.png has 6 x 8\n"
        "expected images of one size, as they were generated"
    )


def test_rotation_by_exif_changes_the_size(tmp_path: Path) -> None:
    root = save_folder(tmp_path, ["0.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[1]).save(root / "1.jpg", exif=exif)
    check_refused(root, "1.jpg: 8 x 6 pixels, but 0.png has 6 x 8")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_files_that_are_not_images_are_refused(tmp_path: Path, content: bytes) -> None:
    root = save_folder(tmp_path, ["0.png", "1.png"])
    (root / "2.png").write_bytes(content)
    check_refused(root, "2.png: corrupt, truncated or of an unknown format")
    (root / "0.png").write_bytes(content)
    check_refused(root, "0.png: corrupt")


def test_a_file_damaged_after_its_header_is_refused(tmp_path: Path) -> None:
    root = save_folder(tmp_path, ["0.png", "1.png"])
    data = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(data[:60])
    check_refused(root, "1.png: corrupt, truncated")


def test_transparent_samples_are_composited_on_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_samples(tmp_path) == 255).all()
    red = open_samples(tmp_path, background="red")
    assert (read(red) == (255, 0, 0)).all()
    assert red.fingerprint != open_samples(tmp_path).fingerprint


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path, "has no images; expected PNG")


def test_folders_report_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    open_samples(save_folder(tmp_path, ["0.png", "1.png"]), lambda *args: calls.append(args))
    assert calls == [(1, 2), (2, 2)]


# --- references -----------------------------------------------------------------------------------


def test_the_included_set_defaults_to_its_held_out_images() -> None:
    splits = open_images("fashion-mnist")
    opened = {split: open_reference("fashion-mnist", 32, split) for split in (None, "val", "all")}
    held_out, val, both = opened.values()
    assert isinstance(held_out, ImageCollection) and isinstance(both, ImageCollection)
    assert held_out.name == "fashion-mnist (val)" and held_out.count == 10_000
    assert held_out.class_names == splits.val.class_names
    assert np.array_equal(held_out.classes_N, splits.val.classes_N)
    first = next(iter(held_out.batches()))
    assert np.array_equal(first, splits.val.read(np.arange(BATCH)))
    assert held_out.fingerprint == val.fingerprint != both.fingerprint
    assert both.count == 70_000
    assert open_reference("fashion-mnist", 28).fingerprint != held_out.fingerprint


def test_a_folder_defaults_to_all_of_its_images(image_folder: Path) -> None:
    splits = open_images(image_folder, 16)
    whole, train = (open_reference(str(image_folder), 16, split) for split in (None, "train"))
    assert isinstance(whole, ImageCollection) and isinstance(train, ImageCollection)
    assert whole.count == 24 and train.count == len(splits.train) < 24
    assert whole.size == (16, 16) and whole.class_names == ("blue", "green", "red")
    expected = [images.read(np.arange(len(images))) for images in (splits.train, splits.val)]
    assert np.array_equal(read(whole), np.concatenate(expected))
    black = open_reference(str(image_folder), 16, background="black")
    assert black.fingerprint != whole.fingerprint


def test_unreadable_images_of_a_reference_can_be_skipped(tmp_path: Path) -> None:
    root = save_folder(tmp_path, [f"{i}.png" for i in range(12)])
    (root / "3.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"3\.png"):
        open_reference(str(root), 8)
    root = save_folder(tmp_path / "large", [f"{i}.png" for i in range(12)], noise(12, 3))
    (root / "3.png").write_bytes(b"not an image")
    opened = open_reference(str(root), 8, skip_bad=True)
    assert isinstance(opened, ImageCollection) and opened.count == 11
