"""Folders: whose they are, and that nothing is touched in others'."""

from pathlib import Path
from typing import Any

import pytest

from ctf.common import claims
from ctf.common.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_vacant_folder_is_claimed_and_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stage"
    for _ in range(2):
        claims.claim(folder, {"a": 1})
    assert names(folder) == ["config.json"]
    assert claims.is_ours(folder, "config.json", what="a training run")


def test_half_written_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".config.json.123.tmp").write_text("{")  # killed in its very first write
    claims.claim(tmp_path, {"a": 1})
    assert names(tmp_path) == ["config.json"]
    (tmp_path / ".model.safetensors.124.tmp").write_text("half")
    claims.claim(tmp_path, {"a": 1})
    assert names(tmp_path) == ["config.json"]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    claims.claim(tmp_path / "stage", {"model": {"width": 8}, "seed": 0})
    before = (tmp_path / "stage" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"another configuration: model\.width was 8, now 16\n"):
        claims.claim(tmp_path / "stage", {"model": {"width": 16}, "seed": 0})
    with pytest.raises(UserError, match=r"seed was 0, now null"):
        claims.claim(tmp_path / "stage", {"model": {"width": 8}})
    assert (tmp_path / "stage" / "config.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".draft.tmp").write_text("mine")
    message = r"exists, but is not an evaluation \(no asked.json\); choose another folder"
    with pytest.raises(UserError, match=message):
        claims.claim(tmp_path, {"a": 1}, marker="asked.json", what="an evaluation")
    assert names(tmp_path) == [".draft.tmp"]


def test_any_of_several_markers_will_do(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("{}")
    assert claims.is_ours(tmp_path, "a.json", "b.json", what="a run")
    assert not claims.is_ours(tmp_path / "new", "a.json", "b.json", what="a run")
    with pytest.raises(UserError):
        claims.is_ours(tmp_path, "a.json", what="a run")


def test_a_vacant_folder_holds_only_what_a_kill_left(tmp_path: Path) -> None:
    assert claims.is_vacant(tmp_path / "nowhere")
    folder = tmp_path / "run"
    (folder / "coarse").mkdir(parents=True)
    (folder / ".fit.json.12.tmp").write_text("half")
    (folder / "coarse" / ".config.json.13.tmp").write_text("half")
    assert claims.is_vacant(folder)
    (folder / "coarse" / ".mine.tmp").write_text("not of `atomic`")
    assert not claims.is_vacant(folder)
    assert not claims.is_vacant(folder / "coarse" / ".mine.tmp")
    (tmp_path / "link").symlink_to("nowhere")
    assert not claims.is_vacant(tmp_path / "link")


@pytest.mark.parametrize(
    ("stored", "config", "expected"),
    [
        ({"a": 1, "b": [1, {"c": 2}]}, {"a": 1, "b": [1, {"c": 2}]}, None),
        ({"a": 1, "b": [1, {"c": 2}]}, {"a": 1, "b": [1, {"c": 3}]}, "b[1].c was 2, now 3"),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, "z was 1, now 2"),  # in the file's order
        ({}, {"new": True}, "new was null, now true"),
        ({"a": [1, 2]}, {"a": [1]}, "a was a list of 2, now a list of 1"),
        ({"a": "x" * 50}, {"a": None}, 'a was "xxxxxxxxxxx..., now null'),
        ([], {}, "it was a list of 0, now {}"),
    ],
)
def test_the_first_difference(stored: Any, config: Any, expected: str | None) -> None:
    assert claims.first_difference(stored, config) == expected


# --- images beside what ctf makes -----------------------------------------------------------------


@pytest.mark.parametrize("other", ["{}", "[]", '{"classes": 3}', "{", "[" * 100_000])
def test_folders_with_files_of_the_same_names_are_not_of_ctf(tmp_path: Path, other: str) -> None:
    for marker in claims.MARKERS:
        (tmp_path / marker).parent.mkdir(exist_ok=True)
        (tmp_path / marker).write_text(other)
    assert not claims.is_ctf_folder(tmp_path)
    assert not claims.is_ctf_folder(tmp_path / "missing")


def test_a_run_is_kept_apart_from_its_images(tmp_path: Path) -> None:
    images = tmp_path / "work" / "images"
    (images / "cat").mkdir(parents=True)
    (images / "cat" / "1.png").touch()
    for out, message in (
        (images, "this is the folder of the images\n"),
        (images / "cat" / "..", "this is the folder of the images\n"),
        (tmp_path / "work", "are inside this folder"),
        (images / "cat", "this is a folder of the images"),
    ):
        with pytest.raises(UserError, match=message):
            claims.check_apart(out, images)
    claims.check_apart(images / "run", images)
    claims.check_apart(tmp_path / "other", images)
    (images / "run").mkdir()
    claims.check_apart(images / "run", images)
