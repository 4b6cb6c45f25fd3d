"""The cache folder: where it is, and that everything works without it."""

from pathlib import Path

import numpy as np
import pytest

from ctf.common import cache


def save_and_load() -> list[int] | None:
    cache.save("a/b.npz", {"x": np.arange(3)})
    stored = cache.load("a/b.npz")
    return None if stored is None else stored["x"].tolist()


@pytest.mark.parametrize(
    ("variable", "folder"), [("CTF_CACHE", ""), ("XDG_CACHE_HOME", "ctf"), ("HOME", ".cache/ctf")]
)
def test_the_folder_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, folder: str
) -> None:
    for name in ("CTF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert save_and_load() == [0, 1, 2]
    assert (tmp_path / folder / "a" / "b.npz").is_file()


def test_nothing_is_cached_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CTF_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert save_and_load() is None


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null", "/dev/null/x"])
def test_nothing_is_cached_where_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("CTF_CACHE", folder)
    assert save_and_load() is None
