"""Folders of images: links, hidden files, and what may not be read."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctf.data.images import open_images
from tests.data.helpers import refusal


def test_links_are_followed_and_loops_are_not(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    (linked / "a" / "inner").symlink_to(folder / "a")
    (linked / "a" / "loop").symlink_to(linked / "a")
    (linked / "b").symlink_to(folder / "b")
    splits = open_images(linked, 16)
    assert len(splits.train) + len(splits.val) == 24


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so it becomes another user meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def open_to_others(folder: Path) -> None:
    """Let others read the folder, and those of pytest that it is in."""
    outer = Path(tempfile.gettempdir())
    for inner in (folder, *folder.parents):
        if outer in inner.parents:
            inner.chmod(0o755)


@pytest.mark.parametrize("inner", ["", "b", "b/deeper"])
def test_unreadable_folders_are_refused(folder: Path, inner: str) -> None:
    open_to_others(folder)
    locked = folder / inner
    locked.chmod(0)
    try:
        with unprivileged():
            assert refusal(folder) == f"{locked}: cannot be read (Permission denied)"
    finally:
        locked.chmod(0o755)


def test_unreadable_files_are_listed(folder: Path) -> None:
    open_to_others(folder)
    (folder / "a" / "03.png").chmod(0)
    with unprivileged():
        assert "cannot be read: Permission denied (1): a/03.png" in refusal(folder)
