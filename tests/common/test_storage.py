"""Files are whole or not there, whatever happens; loads are strict; damaged states are left out."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctf.common import storage
from ctf.common.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic ---------------------------------------------------------------------------------------


def test_the_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    storage.save_json(path, {"a": 1})
    storage.save_json(path, {"a": 2})
    assert storage.load_json(path) == {"a": 2}
    assert names(path.parent) == ["a.json"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.save_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), storage.atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        storage.save_json(path, object())
    assert storage.load_json(path) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    storage.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    plain, ours = (
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.safetensors")
    )
    assert ours == plain


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=r"a: the disk is full; .* unchanged\nfree some space"):
            if kind == "json":
                storage.save_json(path, ["x" * 6000])
            else:
                storage.save_tensors(path, {"x": torch.zeros(6000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_a_disk_that_is_full_when_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        storage.save_json(tmp_path / "a.json", 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("save", [storage.save_json, storage.save_tensors])
def test_paths_that_cannot_be_written(tmp_path: Path, save: object) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "file" / "a", {})  # type: ignore[operator]
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "folder", {})  # type: ignore[operator]
    assert names(tmp_path) == ["file", "folder"]


# --- loads ----------------------------------------------------------------------------------------


def test_tensors_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved = {
        "x": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "y": torch.tensor([1, 2]),
        "z": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    entries = {"made": "by a test", **{str(i): "x" for i in range(20)}}
    storage.save_tensors(path, saved, entries)
    loaded, metadata = storage.load_tensors(path)
    assert metadata == entries
    content = path.read_bytes()
    storage.save_tensors(path, saved, entries)
    assert path.read_bytes() == content  # equal content, equal bytes
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    path.unlink()  # in memory of their own
    assert float(loaded["x"].sum()) == 15


def test_metadata_of_other_programs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for metadata in ({}, {"format": "pt"}):
        save_file({"x": torch.zeros(1)}, path, metadata=metadata)
        assert storage.load_tensors(path)[1] == metadata


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "other"])
def test_damaged_tensors(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    storage.save_tensors(path, {"x": torch.zeros(100)})
    whole = path.read_bytes()
    content = {"empty": b"", "truncated": whole[:-1], "other": b"a letter to my aunt" * 9}
    path.unlink()
    if damage in content:
        path.write_bytes(content[damage])
    expected = "not found" if damage == "missing" else "truncated or not a safetensors file"
    with pytest.raises(UserError, match=f"a.safetensors: {expected}"):
        storage.load_tensors(path)


def test_damaged_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"not found; is .* a folder made by ctf"):
        storage.load_json(path)
    for content in (b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not valid JSON"):
            storage.load_json(path)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # The first example of FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.hash_file(tmp_path / "abc") == expected
    assert storage.hash_json({"a": 1, "b": 2}) == storage.hash_json({"b": 2, "a": 1})
    assert storage.hash_json({"a": 1}) != storage.hash_json({"a": 2})


# --- what a kill leaves ---------------------------------------------------------------------------


def test_only_own_temporaries_are_removed(tmp_path: Path) -> None:
    for name in (".a.json.12.tmp", ".b.tmp", "c.tmp", ".d.x.tmp", "e.12.tmp"):
        (tmp_path / name).touch()
    storage.remove_temporaries(tmp_path)
    assert names(tmp_path) == [".b.tmp", ".d.x.tmp", "c.tmp", "e.12.tmp"]


def test_a_temporary_is_recognized_by_its_name(tmp_path: Path) -> None:
    with storage.atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("1")
        storage.remove_temporaries(tmp_path)  # so it takes it for one
        assert not temporary.exists()
        temporary.write_text("2")
    assert (tmp_path / "a.json").read_text() == "2"
