"""Extraction of tokens, killed and resumed, refused and read back."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from ctf.common.errors import Stopped, UserError
from ctf.common.precision import multiplies_bf16
from ctf.data import shards, tokens
from ctf.data.images import PLAIN, VIEWS, ImageSet, Splits, View
from ctf.data.tokens import Tokens, TokensConfig
from ctf.models.tokenizer import TokenizerConfig, VQModel
from tests.conftest import Command

CONFIG = TokensConfig(views="flip", batch_size=4, shard_images=6)
needs_bf16 = pytest.mark.skipif(
    not multiplies_bf16(torch.device("cpu")), reason="does not multiply bfloat16"
)
ALL = 2 * 20 + 5  # what `extract` has to encode of the pictures below


class Pictures(ImageSet):
    """Noise; views are told apart by their flip alone."""

    def __init__(self, count: int, seed: int, classes: int = 3) -> None:
        generator = np.random.default_rng(seed)
        self.pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        super().__init__(
            name="noise",
            class_names=tuple(f"class {c}" for c in range(classes)),
            classes_N=np.arange(count, dtype=np.int64) % classes,
            image_size=8,
            fingerprint=f"noise {count} {seed} {classes}",
        )

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        pixels = self.pixels[np.asarray(indices, np.int64)]
        return pixels[:, :, ::-1].copy() if view.flip else pixels


def tiny(codebook_size: int = 64) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        TokenizerConfig(
            image_size=8,
            codebook_size=codebook_size,
            channels=8,
            multipliers=(1, 2),
            blocks=1,
            latent_channels=8,
            groups=4,
        )
    )


IMAGES = Splits(Pictures(20, seed=0), Pictures(5, seed=1))


@pytest.fixture(scope="module")
def tokenizer() -> VQModel:
    return tiny()


@pytest.fixture(scope="module")
def folder(tokenizer: VQModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run") / "tokens"
    tokens.extract(tokenizer, "abc", IMAGES, made, CONFIG)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def encoded(tokenizer: VQModel, pixels: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return tokenizer.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


# --- what is extracted -----------------------------------------------------------------------


def test_codes_are_those_of_every_view(tokenizer: VQModel, folder: Path) -> None:
    train, val = Tokens(folder, "train", "abc"), Tokens(folder, "val", "abc")
    assert (len(train), train.views, len(val), val.views) == (20, 2, 5, 1)
    every = np.arange(20)
    pixels = IMAGES.train.read(every)
    assert torch.equal(train.codes(every, 0), encoded(tokenizer, pixels))
    assert torch.equal(train.codes(every, 1), encoded(tokenizer, pixels[:, :, ::-1].copy()))
    assert torch.equal(val.codes(np.arange(5)), encoded(tokenizer, IMAGES.val.read(np.arange(5))))
    assert train.classes_N.tolist() == IMAGES.train.classes_N.tolist()
    assert val.classes_N.tolist() == IMAGES.val.classes_N.tolist()


def test_files(folder: Path) -> None:
    shapes = {p.name: np.load(p).shape for p in folder.glob("*.npy")}
    assert shapes == {
        "train-classes.npy": (20,),
        "train-00000.npy": (6, 2, 16),
        "train-00001.npy": (6, 2, 16),
        "train-00002.npy": (6, 2, 16),
        "train-00003.npy": (2, 2, 16),
        "val-classes.npy": (5,),
        "val-00000.npy": (5, 1, 16),
    }
    assert np.load(folder / "train-00000.npy").dtype == np.uint16
    for path in folder.glob("*.npy"):  # the second array of a file is the checksum of the first
        with open(path, "rb") as file:
            np.load(file)
            end = file.tell()
            assert np.load(file).tobytes() == hashlib.sha256(path.read_bytes()[:end]).digest()
            assert not file.read()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokenizer"] == "abc"
    assert manifest["class_names"] == ["class 0", "class 1", "class 2"]
    assert manifest["train"]["views"] == [dataclasses.asdict(v) for v in VIEWS["flip"]]
    assert manifest["train"]["shards"][3] == {"file": "train-00003.npy", "shape": [2, 2, 16]}


@pytest.mark.parametrize(("codebook_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "int32")])
def test_dtype_by_the_size_of_the_codebook(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    tokenizer = tiny(codebook_size)
    # Only the last code can win: the largest number must survive the dtype.
    torch.nn.init.zeros_(tokenizer.embedding.weight)
    tokenizer.embedding.weight.data[-1, 0] = 1
    with torch.no_grad():
        tokenizer.to_code.weight.zero_()
        tokenizer.to_code.bias.copy_(torch.eye(8)[0])  # type: ignore[union-attr]
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert np.load(tmp_path / "train-00000.npy").dtype == dtype
    codes_BL = Tokens(tmp_path, "train").codes(np.arange(20))
    assert codes_BL.dtype == torch.int64
    assert codes_BL.unique().tolist() == [codebook_size - 1]


def test_every_name_of_views_is_known(tmp_path: Path, tokenizer: VQModel) -> None:
    names = typing.get_args(typing.get_type_hints(TokensConfig)["views"])
    assert set(names) == set(VIEWS)
    for name in names:
        config = dataclasses.replace(CONFIG, views=name)
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path / name, config)
        assert Tokens(tmp_path / name, "train").views == len(VIEWS[name])
        assert Tokens(tmp_path / name, "val").views == 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 99))
def test_balanced_order(classes: list[int], seed: int) -> None:
    classes_N = np.array(classes)
    order = tokens.balanced_order(classes_N, seed)
    assert sorted(order.tolist()) == list(range(len(classes)))
    sizes = np.bincount(classes_N, minlength=5)
    for stop in range(len(order) + 1):
        taken = np.bincount(classes_N[order[:stop]], minlength=5)
        not_used_up = taken[taken < sizes]
        assert taken.max() - not_used_up.min(initial=taken.max()) <= 1


def test_balanced_order_is_drawn_by_the_seed() -> None:
    classes_N = np.arange(100) % 4
    first, again, other = (tokens.balanced_order(classes_N, s).tolist() for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_limit(tmp_path: Path, tokenizer: VQModel) -> None:
    config = dataclasses.replace(CONFIG, seed=3)
    manifest = tokens.extract(tokenizer, "abc", IMAGES, tmp_path / "7", config, limit=7)
    chosen = tokens.balanced_order(IMAGES.train.classes_N, 3)[:7]
    train = Tokens(tmp_path / "7", "train")
    assert (len(train), len(Tokens(tmp_path / "7", "val"))) == (7, 5)
    assert (manifest.limit, manifest.seed) == (7, 3)
    assert torch.equal(train.codes(np.arange(7)), encoded(tokenizer, IMAGES.train.read(chosen)))
    assert train.classes_N.tolist() == IMAGES.train.classes_N[chosen].tolist()
    # As many as there are, or more, is no limit.
    manifest = tokens.extract(tokenizer, "abc", IMAGES, tmp_path / "all", config, limit=20)
    assert (manifest.limit, manifest.seed, manifest.train.count) == (None, None, 20)
    with pytest.raises(UserError, match="limit of training pictures is 0"):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path / "0", config, limit=0)
    assert not (tmp_path / "0").exists()


def test_the_callers_model_is_left_as_it_was(tmp_path: Path) -> None:
    tokenizer = tiny()
    strides = [p.stride() for p in tokenizer.parameters()]
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert [p.stride() for p in tokenizer.parameters()] == strides


# --- killed, resumed, refused ----------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 13))
def test_killed_and_resumed(tmp_path: Path, tokenizer: VQModel, folder: Path, at: int) -> None:
    calls: list[tuple[int, int]] = []

    def kill(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == at:
            raise Killed

    with pytest.raises(Killed):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=kill)
    assert calls[-1][0] < ALL
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert all(p.suffix in (".json", ".npy") for p in kept)
    with pytest.raises(UserError, match=r"incomplete.*\n.*extract again; it keeps"):
        Tokens(tmp_path, "train")
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(folder)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_report_counts_views_and_ends_at_the_total(tmp_path: Path, tokenizer: VQModel) -> None:
    calls: list[tuple[int, int]] = []
    tokens.extract(
        tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=lambda *call: calls.append(call)
    )
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (ALL, ALL)
    # Again: nothing is encoded, one call for each shard.
    calls.clear()
    tokens.extract(
        tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=lambda *call: calls.append(call)
    )
    assert [call[0] for call in calls] == [12, 24, 36, 40, 45]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_stopped_by_sigterm_nothing_is_lost(
    tmp_path: Path, tokenizer: VQModel, folder: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """It ends after the batch, again and again; no picture is encoded twice."""
    encode, calls = tokens._encode, 0

    def stop(tokenizer: VQModel, pictures: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(tokenizer, pictures)

    monkeypatch.setattr(tokens, "_encode", stop)
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(20):
        try:
            tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
            break
        except Stopped as stopped:
            assert str(stopped).startswith(f"{tmp_path}: stopped, and saved what was encoded")
            assert signal.getsignal(signal.SIGTERM) == before
    assert calls == 2 * (2 + 2 + 2 + 1) + 2  # batches of two views of 6, 6, 6, 2; plainly of 5
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_begun_shard_that_is_damaged_is_encoded_again(
    tmp_path: Path, tokenizer: VQModel, folder: Path, damage: str
) -> None:
    def stop(done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=stop)
    begun = tmp_path / "train-00000.begun.npy"
    content = begun.read_bytes()
    changed = {"cut": content[:-1], "empty": b"", "flip": content[:-1] + b"?"}[damage]
    begun.write_bytes(changed)
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(folder)


KILLED_WHILE_WRITING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tests.data.test_tokens import *
replace, count = os.replace, 0
def kill(source, target):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
tokens.extract(tiny(), "abc", IMAGES, Path({folder!r}), CONFIG)
"""


def test_killed_while_writing(tmp_path: Path, tokenizer: VQModel, folder: Path) -> None:
    script = KILLED_WHILE_WRITING.format(
        tests=str(Path(__file__).parents[2]), at=4, folder=str(tmp_path)
    )
    process = subprocess.run([sys.executable, "-c", script], check=False)
    assert process.returncode == -signal.SIGKILL
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert names == {"manifest.json", "train-classes.npy", "train-00000.npy"}
    assert len(list(tmp_path.glob(".train-00001.npy.*.tmp"))) == 1
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(folder)  # the left-over is gone, too


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "of another shape"])
def test_damaged_shard(tmp_path: Path, tokenizer: VQModel, folder: Path, damage: str) -> None:
    for name, content in contents(folder).items():
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
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(folder)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def overwrite(path: Path, value: int) -> None:
    """A value of a shard, with a checksum that is right."""
    array = np.load(path)
    array.flat[-1] = value
    shards.save(path, array)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a code": (lambda p: flip(p, 200), "its content is not what its checksum says"),
    "a bit of the header": (lambda p: flip(p, 3), "not an array, or cut off"),
    "a bit of the checksum": (lambda p: flip(p, -1), "its content is not what its checksum says"),
    "cut off": (lambda p: os.truncate(p, 300), "cut off"),
    "checksum cut off": (
        lambda p: os.truncate(p, p.stat().st_size - 3), "its content is not what its checksum says"
    ),
    "missing": (Path.unlink, "missing"),
    "a code too large": (lambda p: overwrite(p, 64), "holds 64, expected 0 to 63"),
    "of another shape": (
        lambda p: shards.save(p, np.zeros((6, 2, 15), np.uint16)),
        "holds uint16 of shape (6, 2, 15), expected uint16 of (6, 2, 16)",
    ),
    "of another type": (
        lambda p: shards.save(p, np.zeros((6, 2, 16), np.int32)),
        "holds int32 of shape (6, 2, 16), expected uint16 of (6, 2, 16)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_names_what_is_damaged_and_extract_mends_it(
    tmp_path: Path, tokenizer: VQModel, folder: Path, damage: str, ctf: Command
) -> None:
    made = tmp_path / "tokens"
    shutil.copytree(folder, made)
    spoil, reason = DAMAGE[damage]
    assert ctf("tokens", "check", tmp_path).out == f"{made}: 7 files are whole\n"
    spoil(made / "train-00001.npy")
    result = ctf("tokens", "check", tmp_path)
    assert result.code == 2
    assert result.err.endswith(
        f"ctf: {made}: 1 of 7 files are damaged; run ctf tokens extract again, which makes them "
        f"anew and keeps the others\ntrain-00001.npy: {reason}\n"
    )
    tokens.extract(tokenizer, "abc", IMAGES, made, CONFIG)
    assert contents(made) == contents(folder)


def test_check_of_classes_and_of_several_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
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
def test_manifest_that_contradicts_itself(
    folder: Path, tmp_path: Path, change: tuple[str, object]
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["train"][change[0]] = change[1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for look in (tokens.check, lambda folder: Tokens(folder, "val")):
        with pytest.raises(UserError, match=r"manifest.json: damaged: its shards are not .* views"):
            look(tmp_path)


def test_tokens_without_checksums_are_those_of_an_earlier_version(
    folder: Path, tmp_path: Path, tokenizer: VQModel, ctf: Command
) -> None:
    made = tmp_path / "tokens"
    shutil.copytree(folder, made)
    for path in made.glob("*.npy"):
        np.save(path, np.load(path))
    every = np.arange(20)
    assert torch.equal(Tokens(made, "train").codes(every), Tokens(folder, "train").codes(every))
    older = "; 7 of an earlier version have no checksum, and were only read"
    assert ctf("tokens", "check", tmp_path).out == f"{made}: 7 files are whole{older}\n"
    before = contents(made)
    tokens.extract(tokenizer, "abc", IMAGES, made, CONFIG)
    assert contents(made) == before


def test_shard_that_is_cut_off_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    reader = Tokens(tmp_path, "train")
    os.truncate(tmp_path / "train-00001.npy", 150)
    reader.codes(np.array([0]))
    with pytest.raises(UserError, match=r"train-00001.npy: cannot be read \(it is cut off\)"):
        reader.codes(np.array([0, 6]))
    (tmp_path / "train-00002.npy").unlink()
    with pytest.raises(UserError, match=r"train-00002.npy: cannot be read \(No such file"):
        reader.codes(np.array([12]))


@given(st.integers(0, 2000), st.integers(0, 7))
def test_every_bit_counts(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "bits.npy"
    shards.save(path, np.arange(100, dtype=np.uint16))
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(shards.Damaged):
        shards.verify(path, (100,), "uint16", 2**16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer_hash": "def"}, 'tokenizer was "abc", now "def"'),
        ({"limit": 7}, "limit was null, now 7"),
        ({"views": "plain"}, "train.views was a list of 2, now a list of 1"),
        ({"shard_images": 7}, "train.shards was a list of 4, now a list of 3"),
        ({"seed": 1}, 'train.fingerprint was "noise 20 0 3", now "noise 20 1 3"'),
        ({"classes": 4}, "class_names was a list of 3, now a list of 4"),
        ({"codebook_size": 65}, "codebook_size was 64, now 65"),
    ],
)
def test_another_run_is_refused(folder: Path, change: dict[str, typing.Any], reason: str) -> None:
    before = contents(folder)
    fields = {k: v for k, v in change.items() if k in ("views", "shard_images")}
    with pytest.raises(UserError, match=rf"{reason}\n.*choose another folder"):
        tokens.extract(
            tiny(change.get("codebook_size", 64)),
            change.get("tokenizer_hash", "abc"),
            Splits(Pictures(20, change.get("seed", 0), change.get("classes", 3)), IMAGES.val),
            folder,
            dataclasses.replace(CONFIG, **fields),
            limit=change.get("limit"),
        )
    assert contents(folder) == before


def test_batch_size_may_change(folder: Path, tokenizer: VQModel) -> None:
    tokens.extract(tokenizer, "abc", IMAGES, folder, dataclasses.replace(CONFIG, batch_size=1))


@needs_bf16
def test_precision(folder: Path, tokenizer: VQModel, tmp_path: Path) -> None:
    exact = tokens.extract(tokenizer, "abc", IMAGES, folder, CONFIG, precision="fp32")
    assert exact.precision == "fp32"  # as by default: the folder is taken for its own
    low = tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, precision="bf16")
    assert low.precision == json.loads((tmp_path / "manifest.json").read_text())["precision"]
    assert low == dataclasses.replace(exact, precision="bf16")
    for there, other in ((folder, "bf16"), (tmp_path, "auto")):
        before = contents(there)
        with pytest.raises(UserError, match="another configuration: precision was "):
            tokens.extract(tokenizer, "abc", IMAGES, there, CONFIG, precision=other)
        assert contents(there) == before
    tokens.check(tmp_path)


def test_a_manifest_of_before_there_was_a_precision(
    folder: Path, tokenizer: VQModel, tmp_path: Path
) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["precision"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    before = contents(old)
    assert tokens.extract(tokenizer, "abc", IMAGES, old, CONFIG).precision == "fp32"
    assert contents(old) == before and len(Tokens(old, "train", "abc")) == 20


def test_bf16_where_it_is_not_multiplied(
    tokenizer: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctf.common.precision.multiplies_bf16", lambda _: False)
    with pytest.raises(UserError, match="cpu does not multiply bfloat16 here"):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path / "t", CONFIG, precision="bf16")
    assert not (tmp_path / "t").exists()


def test_the_callers_tokenizer_stays(tokenizer: VQModel, folder: Path, tmp_path: Path) -> None:
    layers = [type(part) for part in tokenizer.modules()]
    tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert [type(part) for part in tokenizer.modules()] == layers


def test_folder_of_something_else(tmp_path: Path, tokenizer: VQModel) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"not a folder of tokens \(no manifest.json\); choose"):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex"):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path / "thesis.tex", CONFIG)


def test_pictures_of_another_size(tmp_path: Path) -> None:
    tokenizer = VQModel(dataclasses.replace(tiny().config, image_size=16))
    with pytest.raises(UserError, match=r"8 pixels wide.* for 16; .*--image-size 16"):
        tokens.extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)


def test_config_errors() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        TokensConfig(batch_size=0)
    with pytest.raises(UserError, match="shard_images is -1"):
        TokensConfig(shard_images=-1)


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from tests.data.test_tokens import *
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    tokens.extract(tiny(), "abc", Splits(Pictures(200, 0), IMAGES.val), Path({folder!r}),
                   TokensConfig(shard_images=200))
except UserError as error:
    print(error)
"""


def test_full_disk_is_told(tmp_path: Path) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "train-00000.npy: the disk is full" in process.stdout
    assert not (tmp_path / "train-00000.npy").exists()


# --- the reader ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 1)), max_size=30))
@settings(deadline=None)
def test_codes_across_shards(folder: Path, pairs: list[tuple[int, int]]) -> None:
    files = sorted(folder.glob("train-0*.npy"))
    everything = np.concatenate([np.load(file) for file in files])
    indices = np.array([i for i, _ in pairs], np.int64)
    views = np.array([v for _, v in pairs], np.int64)
    codes_BL = Tokens(folder, "train").codes(indices, views)
    assert codes_BL.dtype == torch.int64
    assert codes_BL.shape == (len(pairs), 16)
    assert np.array_equal(codes_BL.numpy(), everything[indices, views])


@pytest.mark.parametrize(
    ("index", "view", "reason"),
    [(20, 0, "picture 20 of 20"), (-1, 0, "picture -1"), (0, 2, "view 2 of 2"), (0, -1, "view -1")],
)
def test_pictures_and_views_that_are_not_there(
    folder: Path, index: int, view: int, reason: str
) -> None:
    with pytest.raises(IndexError, match=reason):
        Tokens(folder, "train").codes(np.array([0, index]), np.array([0, view]))


def test_changed_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer abc, expected def.*\nrun ctf tokens extract"):
        Tokens(folder, "train", "def")


def test_folder_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        Tokens(tmp_path, "train")


def test_pickled_reader_does_not_hold_the_codes(tmp_path: Path, tokenizer: VQModel) -> None:
    images = Splits(Pictures(2000, seed=0), IMAGES.val)
    tokens.extract(tokenizer, "abc", images, tmp_path, TokensConfig(shard_images=2000))
    reader = Tokens(tmp_path, "train")
    every = np.arange(2000)
    codes_BL = reader.codes(every)
    pickled = pickle.dumps(reader)
    size = (tmp_path / "train-00000.npy").stat().st_size
    assert len(pickled) - reader.classes_N.nbytes < size / 10
    assert torch.equal(pickle.loads(pickled).codes(every), codes_BL)
