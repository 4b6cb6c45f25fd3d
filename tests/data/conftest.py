"""Folders of images, intact and damaged, and a folder of tokens."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctf.data.extraction import extract
from ctf.models.tokenizer import VQModel
from tests.data.helpers import RGB, encode, gradient, save
from tests.data.tiny_tokens import CONFIG, IMAGES, make_tokenizer

DAMAGED = ("a/cut.jpg", "a/text.png", "b/empty.gif")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone."""
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with twelve images each, of different colours, and files to be ignored."""
    root = tmp_path / "images"
    for index in range(12):
        save(root / "a" / f"{index:02d}.png", np.maximum(RGB, 10 * index))
        save(root / "b" / "deeper" / f"{index:02d}.png", np.minimum(RGB, 70 + 10 * index))
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / ".hidden.png").write_text("not an image")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "x.png").write_text("not an image")
    (root / "list.csv").write_text("")
    return root


@pytest.fixture
def damaged_folder(folder: Path) -> Path:
    """The folder with the three files of DAMAGED in it, and one image that is too small."""
    intact = encode(Image.fromarray(RGB), "JPEG")
    (folder / "a" / "cut.jpg").write_bytes(intact[: len(intact) // 2])
    (folder / "a" / "text.png").write_text("hello")
    (folder / "b" / "empty.gif").write_bytes(b"")
    save(folder / "b" / "small.png", gradient(9, 12))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> VQModel:
    return make_tokenizer()


@pytest.fixture(scope="session")
def token_folder(tokenizer: VQModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokens"
    extract(tokenizer, "abc", IMAGES, folder, CONFIG)
    return folder
