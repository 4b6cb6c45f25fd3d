"""An empty current folder, and a cache of reference features that tests share."""

from pathlib import Path

import pytest

from ctf.data.image_set import ImageSet
from ctf.data.images import open_images


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with the shared cache."""
    monkeypatch.setenv("CTF_CACHE", str(shared_cache))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """The held-out images of Fashion-MNIST."""
    return open_images("fashion-mnist").val
