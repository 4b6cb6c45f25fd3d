"""--out where nothing can be written: refused at once, and nothing is left there."""

from pathlib import Path
from typing import Any

import pytest

from ctf.common import storage
from ctf.common.errors import UserError
from tests.cli.helpers import check_refused
from tests.conftest import SIDE, Command, read_files

COMMANDS = [
    ["demo"],
    ["fit", "IMAGES", "--image-size", SIDE],
    ["sample", "RUN"],
    ["evaluate", "RUN", "--samples", 12, "--reference", "IMAGES"],
    ["tokenizer", "train", "IMAGES", "--image-size", SIDE],
    ["clusters", "fit", "RUN"],
    ["train", "baseline", "RUN"],
    ["runs", "show", "RUN"],
    ["classifier", "train", "IMAGES", "--image-size", SIDE],
    ["convert", "llamagen", "--vq", "nowhere.pt"],
    ["bench", "sample"],
    ["bench", "train"],
    ["bench", "fit"],
    ["bench", "tokens"],
    ["reproduce", "table1"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command[:2])))
def test_a_place_where_nothing_can_be_written_is_refused_at_once(
    ctf: Command, run: Path, image_folder: Path, tmp_path: Path, command: list[Any]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    arguments = [{"RUN": run, "IMAGES": image_folder}.get(word, word) for word in command]
    for out, reason in (
        (Path("/proc/x"), "cannot be written"),
        (Path("/dev/null/x"), "Not a directory"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop" / "x", "symbolic links"),
        (tmp_path / "link", "exists, and is not a folder"),
        (tmp_path / "file", "exists, and is not a folder"),
    ):
        result = ctf(*arguments, "--out", out)
        assert check_refused(result, reason).startswith(f"ctf: {out}")
        assert result.out == "" and result.err.startswith("ctf: ")  # nothing was begun
    assert read_files(tmp_path) == {"file": b"mine"}


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("new", "a/b/c", "empty", "sheet.png", "empty/x"):
        storage.check_writable(tmp_path / path)
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_names_of_almost_255_bytes_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 250, "\u72ac" * 84):
        storage.save_text(tmp_path / name, "content")
        assert (tmp_path / name).read_text() == "content"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="File name too long"):
        storage.save_text(tmp_path / ("x" * 256), "content")


@pytest.mark.parametrize("name", ["drawn-1.5", "v0.2", "a.b.c", "samples.final", ".hidden"])
def test_a_name_with_a_dot_is_a_folder_of_samples(
    ctf: Command, run: Path, tmp_path: Path, name: str
) -> None:
    assert ctf("sample", run, "--count", 1, "--out", tmp_path / name).code == 0
    assert (tmp_path / name / "000002.png").is_file()


@pytest.mark.parametrize("name", ["sheet.jpg", "sheet.JPEG", "sheet.webp", "a.gif", "a.pdf"])
def test_another_type_of_image_is_refused(
    ctf: Command, run: Path, tmp_path: Path, name: str
) -> None:
    result = ctf("sample", run, "--count", 1, "--out", tmp_path / name)
    check_refused(result, "expected a name ending in .png, or a folder")
