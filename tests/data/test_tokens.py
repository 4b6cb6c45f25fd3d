"""Folders of tokens: checked, read, and refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctf.common.errors import UserError
from ctf.data import shards, tokens
from ctf.data.extraction import TokensConfig, extract
from ctf.data.image_set import Splits
from ctf.data.tokens import Tokens
from ctf.models.tokenizer import VQModel
from tests.conftest import Command
from tests.data.tiny_tokens import CONFIG, IMAGES, Noise, contents


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "of another shape"])
def test_damaged_shards_are_refused_and_replaced(
    tmp_path: Path, tokenizer: VQModel, token_folder: Path, damage: str
) -> None:
    for name, content in contents(token_folder).items():
        (tmp_path / name).write_bytes(content)
    shard = tmp_path / "train-00001.npy"
    if damage == "truncated":
        os.truncate(shard, 300)
    elif damage == "empty":
        os.truncate(shard, 0)
    elif damage == "missing":
        shard.unlink()
    else:
        np.save(shard, np.zeros((6, 2, 15), np.uint16))
    with pytest.raises(UserError, match=r"train-00001.npy is missing or damaged\n"):
        Tokens(tmp_path, "train")
    Tokens(tmp_path, "val")
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(token_folder)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def overwrite(path: Path, value: int) -> None:
    """Change a value of a shard, with a correct checksum."""
    array = np.load(path)
    array.flat[-1] = value
    shards.save(path, array)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a code": (lambda p: flip(p, 200), "does not match its checksum"),
    "a bit of the header": (lambda p: flip(p, 3), "not a .npy file, or truncated"),
    "a bit of the checksum": (lambda p: flip(p, -1), "does not match its checksum"),
    "truncated": (lambda p: os.truncate(p, 300), "truncated"),
    "truncated checksum": (
        lambda p: os.truncate(p, p.stat().st_size - 3), "does not match its checksum"
    ),
    "missing": (Path.unlink, "missing"),
    "a code too large": (lambda p: overwrite(p, 64), "holds 64, expected 0 to 63"),
    "of another shape": (
        lambda p: shards.save(p, np.zeros((6, 2, 15), np.uint16)),
        "holds uint16 of shape (6, 2, 15), expected uint16 of shape (6, 2, 16)",
    ),
    "of another type": (
        lambda p: shards.save(p, np.zeros((6, 2, 16), np.int32)),
        "holds int32 of shape (6, 2, 16), expected uint16 of shape (6, 2, 16)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_lists_damage_and_extract_repairs_it(
    tmp_path: Path, tokenizer: VQModel, token_folder: Path, damage: str, ctf: Command
) -> None:
    made = tmp_path / "tokens"
    shutil.copytree(token_folder, made)
    spoil, reason = DAMAGE[damage]
    assert ctf("tokens", "check", tmp_path).out == f"{made}: 7 files are intact\n"
    spoil(made / "train-00001.npy")
    result = ctf("tokens", "check", tmp_path)
    assert result.code == 2
    assert result.err.endswith(
        f"ctf: {made}: 1 of 7 files are damaged; run ctf tokens extract again to replace "
        f"them\ntrain-00001.npy: {reason}\n"
    )
    extract(tokenizer, "abc", IMAGES, made, CONFIG)
    assert contents(made) == contents(token_folder)


def test_check_covers_classes_and_lists_every_file(token_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(token_folder, tmp_path, dirs_exist_ok=True)
    overwrite(tmp_path / "train-classes.npy", 3)
    overwrite(tmp_path / "val-classes.npy", -1)
    (tmp_path / "val-00000.npy").unlink()
    with pytest.raises(UserError) as caught:
        tokens.check(tmp_path)
    assert str(caught.value).split("\n")[1:] == [
        "train-classes.npy: holds 3, expected 0 to 2",
        "val-classes.npy: holds -1, expected 0 to 2",
        "val-00000.npy: missing",
    ]


@pytest.mark.parametrize("change", [("count", 19), ("shards", []), ("views", [])])
def test_inconsistent_manifests_are_refused(
    token_folder: Path, tmp_path: Path, change: tuple[str, object]
) -> None:
    shutil.copytree(token_folder, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["train"][change[0]] = change[1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for open_folder in (tokens.check, lambda folder: Tokens(folder, "val")):
        with pytest.raises(
            UserError, match=r"manifest.json: damaged: its shards do not hold .* views"
        ):
            open_folder(tmp_path)


def test_tokens_without_checksums_are_those_of_earlier_versions(
    token_folder: Path, tmp_path: Path, tokenizer: VQModel, ctf: Command
) -> None:
    made = tmp_path / "tokens"
    shutil.copytree(token_folder, made)
    for path in made.glob("*.npy"):
        np.save(path, np.load(path))
    every = np.arange(20)
    assert torch.equal(
        Tokens(made, "train").codes(every), Tokens(token_folder, "train").codes(every)
    )
    older = "; 7 of them, from an earlier version, have no checksum"
    assert ctf("tokens", "check", tmp_path).out == f"{made}: 7 files are intact{older}\n"
    before = contents(made)
    extract(tokenizer, "abc", IMAGES, made, CONFIG)
    assert contents(made) == before


def test_a_shard_damaged_after_it_was_opened_is_reported(
    token_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(token_folder, tmp_path, dirs_exist_ok=True)
    reader = Tokens(tmp_path, "train")
    os.truncate(tmp_path / "train-00001.npy", 150)
    reader.codes(np.array([0]))
    with pytest.raises(UserError, match=r"train-00001.npy: cannot be read \(truncated\)"):
        reader.codes(np.array([0, 6]))
    (tmp_path / "train-00002.npy").unlink()
    with pytest.raises(UserError, match=r"train-00002.npy: cannot be read \(No such file"):
        reader.codes(np.array([12]))


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 1)), max_size=30))
def test_codes_are_read_across_shards(token_folder: Path, pairs: list[tuple[int, int]]) -> None:
    files = sorted(token_folder.glob("train-0*.npy"))
    everything = np.concatenate([np.load(file) for file in files])
    indices = np.array([i for i, _ in pairs], np.int64)
    views = np.array([v for _, v in pairs], np.int64)
    codes_BL = Tokens(token_folder, "train").codes(indices, views)
    assert codes_BL.dtype == torch.int64
    assert codes_BL.shape == (len(pairs), 16)
    assert np.array_equal(codes_BL.numpy(), everything[indices, views])


@pytest.mark.parametrize(
    ("index", "view", "reason"),
    [(20, 0, "image 20 of 20"), (-1, 0, "image -1"), (0, 2, "view 2 of 2"), (0, -1, "view -1")],
)
def test_indices_out_of_range_are_refused(
    token_folder: Path, index: int, view: int, reason: str
) -> None:
    with pytest.raises(IndexError, match=reason):
        Tokens(token_folder, "train").codes(np.array([0, index]), np.array([0, view]))


def test_tokens_of_another_tokenizer_are_refused(token_folder: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer abc, expected def.*\nrun ctf tokens extract"):
        Tokens(token_folder, "train", "def")


def test_a_folder_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        Tokens(tmp_path, "train")


def test_a_pickled_reader_does_not_hold_the_codes(tmp_path: Path, tokenizer: VQModel) -> None:
    images = Splits(Noise(2000, seed=0), IMAGES.val)
    extract(tokenizer, "abc", images, tmp_path, TokensConfig(shard_images=2000))
    reader = Tokens(tmp_path, "train")
    every = np.arange(2000)
    codes_BL = reader.codes(every)
    pickled = pickle.dumps(reader)
    size = (tmp_path / "train-00000.npy").stat().st_size
    assert len(pickled) - reader.classes_N.nbytes < size / 10
    assert torch.equal(pickle.loads(pickled).codes(every), codes_BL)
