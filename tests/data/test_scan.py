"""The scan of a source: what its cache saves, and what invalidates it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctf.data import images, scan
from ctf.data.decode import decode
from ctf.data.images import open_images
from ctf.data.transforms import View
from tests.data.conftest import DAMAGED
from tests.data.helpers import equal, gradient, refusal, save


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> list[int]:
    """Collects the lengths of the files that are decoded by scans; the cache is empty."""
    seen: list[int] = []

    def counted(data: bytes, *rest: object) -> Image.Image:
        seen.append(len(data))
        return decode(data, *rest)

    monkeypatch.setattr(scan, "decode", counted)
    return seen


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_are_scanned_once(
    folder: Path, scanned: list[int], in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(images, "CACHE_BYTES", 0)
    first = open_images(folder, 16)
    assert len(scanned) == 24
    reports: list[tuple[int, int]] = []
    for size in (16, 8, 16):
        again = open_images(folder, size, progress=lambda *call: reports.append(call))
        assert again.train.image_size == size
    assert len(scanned) == 24 and not reports
    assert equal(first, again)
    every = np.arange(len(first.train))
    view = View(flip=True)
    assert np.array_equal(first.train.read(every, view), again.train.read(every, view))


def test_changed_files_are_scanned_again(folder: Path, scanned: list[int]) -> None:
    open_images(folder, 16)
    scanned.clear()
    save(folder / "a" / "new.png")
    (folder / "a" / "00.png").unlink()
    save(folder / "b" / "deeper" / "03.png", gradient(30, 30))
    (folder / "b" / "deeper" / "04.png").rename(folder / "b" / "deeper" / "renamed.png")
    times = (folder / "a" / "05.png").stat()
    (folder / "a" / "05.png").write_bytes((folder / "a" / "06.png").read_bytes())
    os.utime(folder / "a" / "05.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    known = open_images(folder, 16)
    assert len(scanned) == 4
    shutil.rmtree(os.environ["CTF_CACHE"])
    assert equal(known, open_images(folder, 16))


def test_unreadable_files_are_scanned_each_time(damaged_folder: Path, scanned: list[int]) -> None:
    message = refusal(damaged_folder)
    scanned.clear()
    assert refusal(damaged_folder) == message
    assert sorted(scanned) == sorted(len((damaged_folder / n).read_bytes()) for n in DAMAGED)
    known = open_images(damaged_folder, 16, skip_bad=True)
    shutil.rmtree(os.environ["CTF_CACHE"])
    assert equal(known, open_images(damaged_folder, 16, skip_bad=True))
    save(damaged_folder / "b" / "small.png")
    for name in DAMAGED:
        (damaged_folder / name).unlink()
    assert open_images(damaged_folder, 16).skipped == ()


def test_an_interrupted_scan_resumes(
    folder: Path, scanned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SAVE_SECONDS", -1.0)
    for number in range(300):
        save(folder / "a" / f"more-{number}.png", gradient(16, 16))

    def stop(done: int, total: int) -> None:
        if done == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_images(folder, 16, progress=stop)
    scanned.clear()
    open_images(folder, 16)
    assert len(scanned) == 324 - 256


@pytest.mark.parametrize("damage", ["cut off", "nonsense", "not a folder"])
def test_a_damaged_cache_is_replaced(
    folder: Path, scanned: list[int], damage: str, tmp_path: Path
) -> None:
    first = open_images(folder, 16)
    (file,) = (tmp_path / "cache" / "scans").iterdir()
    if damage == "cut off":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "nonsense":
        file.write_bytes(b"nonsense")
    else:
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("")
    assert equal(open_images(folder, 16), first)
    assert len(scanned) == 48
