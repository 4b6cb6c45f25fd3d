"""Extraction of tokens: what is encoded, killed and resumed, refused."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctf.common.errors import Stopped, UserError
from ctf.common.precision import supports_bf16
from ctf.data import extraction, tokens
from ctf.data.extraction import TokensConfig, balanced_order, extract
from ctf.data.image_set import Splits
from ctf.data.tokens import Tokens
from ctf.data.transforms import VIEWS
from ctf.models.tokenizer import VQModel
from tests.data.tiny_tokens import CONFIG, IMAGES, VIEWS_IN_ALL, Noise, contents, make_tokenizer

needs_bf16 = pytest.mark.skipif(
    not supports_bf16(torch.device("cpu")), reason="does not multiply bfloat16"
)


def encoded(tokenizer: VQModel, pixels: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return tokenizer.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


def test_every_view_is_encoded(tokenizer: VQModel, token_folder: Path) -> None:
    train, val = Tokens(token_folder, "train", "abc"), Tokens(token_folder, "val", "abc")
    assert (len(train), train.views, len(val), val.views) == (20, 2, 5, 1)
    every = np.arange(20)
    pixels = IMAGES.train.read(every)
    assert torch.equal(train.codes(every, 0), encoded(tokenizer, pixels))
    assert torch.equal(train.codes(every, 1), encoded(tokenizer, pixels[:, :, ::-1].copy()))
    assert torch.equal(val.codes(np.arange(5)), encoded(tokenizer, IMAGES.val.read(np.arange(5))))
    assert train.classes_N.tolist() == IMAGES.train.classes_N.tolist()
    assert val.classes_N.tolist() == IMAGES.val.classes_N.tolist()


@pytest.mark.usefixtures("three_threads")
def test_parts_of_batches_have_the_same_codes(
    token_folder: Path, tmp_path: Path, tokenizer: VQModel
) -> None:
    extract(tokenizer, "abc", IMAGES, tmp_path / "tokens", CONFIG)
    assert contents(tmp_path / "tokens") == contents(token_folder)
    assert torch.get_num_threads() == 3


def test_files_and_manifest(token_folder: Path) -> None:
    shapes = {p.name: np.load(p).shape for p in token_folder.glob("*.npy")}
    assert shapes == {
        "train-classes.npy": (20,),
        "train-00000.npy": (6, 2, 16),
        "train-00001.npy": (6, 2, 16),
        "train-00002.npy": (6, 2, 16),
        "train-00003.npy": (2, 2, 16),
        "val-classes.npy": (5,),
        "val-00000.npy": (5, 1, 16),
    }
    assert np.load(token_folder / "train-00000.npy").dtype == np.uint16
    for path in token_folder.glob("*.npy"):  # a second array is the checksum of the first
        with open(path, "rb") as file:
            np.load(file)
            end = file.tell()
            assert np.load(file).tobytes() == hashlib.sha256(path.read_bytes()[:end]).digest()
            assert not file.read()
    manifest = json.loads((token_folder / "manifest.json").read_text())
    assert manifest["tokenizer"] == "abc"
    assert manifest["class_names"] == ["class 0", "class 1", "class 2"]
    assert manifest["train"]["views"] == [dataclasses.asdict(v) for v in VIEWS["flip"]]
    assert manifest["train"]["shards"][3] == {"file": "train-00003.npy", "shape": [2, 2, 16]}


@pytest.mark.parametrize(("codebook_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "int32")])
def test_the_dtype_holds_the_largest_code(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    tokenizer = make_tokenizer(codebook_size)
    # Every image is encoded as the last code: the largest number must survive the dtype.
    torch.nn.init.zeros_(tokenizer.embedding.weight)
    tokenizer.embedding.weight.data[-1, 0] = 1
    with torch.no_grad():
        tokenizer.to_code.weight.zero_()
        tokenizer.to_code.bias.copy_(torch.eye(8)[0])  # type: ignore[union-attr]
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert np.load(tmp_path / "train-00000.npy").dtype == dtype
    codes_BL = Tokens(tmp_path, "train").codes(np.arange(20))
    assert codes_BL.dtype == torch.int64
    assert codes_BL.unique().tolist() == [codebook_size - 1]


def test_every_name_of_views_is_accepted(tmp_path: Path, tokenizer: VQModel) -> None:
    names = typing.get_args(typing.get_type_hints(TokensConfig)["views"])
    assert set(names) == set(VIEWS)
    for name in names:
        config = dataclasses.replace(CONFIG, views=name)
        extract(tokenizer, "abc", IMAGES, tmp_path / name, config)
        assert Tokens(tmp_path / name, "train").views == len(VIEWS[name])
        assert Tokens(tmp_path / name, "val").views == 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 99))
def test_every_prefix_of_the_balanced_order_is_balanced(classes: list[int], seed: int) -> None:
    classes_N = np.array(classes)
    order = balanced_order(classes_N, seed)
    assert sorted(order.tolist()) == list(range(len(classes)))
    sizes = np.bincount(classes_N, minlength=5)
    for stop in range(len(order) + 1):
        taken = np.bincount(classes_N[order[:stop]], minlength=5)
        not_used_up = taken[taken < sizes]
        assert taken.max() - not_used_up.min(initial=taken.max()) <= 1


def test_the_balanced_order_depends_on_the_seed() -> None:
    classes_N = np.arange(100) % 4
    first, again, other = (balanced_order(classes_N, s).tolist() for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_limit_takes_the_first_of_the_balanced_order(tmp_path: Path, tokenizer: VQModel) -> None:
    config = dataclasses.replace(CONFIG, seed=3)
    manifest = extract(tokenizer, "abc", IMAGES, tmp_path / "7", config, limit=7)
    chosen = balanced_order(IMAGES.train.classes_N, 3)[:7]
    train = Tokens(tmp_path / "7", "train")
    assert (len(train), len(Tokens(tmp_path / "7", "val"))) == (7, 5)
    assert (manifest.limit, manifest.seed) == (7, 3)
    assert torch.equal(train.codes(np.arange(7)), encoded(tokenizer, IMAGES.train.read(chosen)))
    assert train.classes_N.tolist() == IMAGES.train.classes_N[chosen].tolist()
    # As many as there are is no limit.
    manifest = extract(tokenizer, "abc", IMAGES, tmp_path / "all", config, limit=20)
    assert (manifest.limit, manifest.seed, manifest.train.count) == (None, None, 20)
    with pytest.raises(UserError, match="limit: got 0, expected 1 or more training images"):
        extract(tokenizer, "abc", IMAGES, tmp_path / "0", config, limit=0)
    assert not (tmp_path / "0").exists()


def test_the_callers_model_is_left_as_it_was(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    strides = [p.stride() for p in tokenizer.parameters()]
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert [p.stride() for p in tokenizer.parameters()] == strides


def test_the_callers_tokenizer_stays(
    tokenizer: VQModel, token_folder: Path, tmp_path: Path
) -> None:
    layers = [type(part) for part in tokenizer.modules()]
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert [type(part) for part in tokenizer.modules()] == layers


# --- killed, resumed, refused ------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 13))
def test_a_killed_extraction_resumes_to_the_same_files(
    tmp_path: Path, tokenizer: VQModel, token_folder: Path, at: int
) -> None:
    calls: list[tuple[int, int]] = []

    def kill(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == at:
            raise Killed

    with pytest.raises(Killed):
        extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=kill)
    assert calls[-1][0] < VIEWS_IN_ALL
    files = list(tmp_path.iterdir())
    assert all(p.suffix in (".json", ".npy") for p in files)
    before = {p: p.stat().st_mtime_ns for p in files if ".begun" not in p.name}
    with pytest.raises(UserError, match=r"incomplete.*\n.*extract again; it keeps"):
        Tokens(tmp_path, "train")
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(token_folder)
    assert {p: p.stat().st_mtime_ns for p in before} == before


class InterruptedTokenizer(VQModel):
    """Is interrupted by Ctrl-C in its third call of `encode`."""

    calls: ClassVar[list[int]] = []

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(images_BCHW))
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return super().encode(images_BCHW)


@pytest.mark.parametrize("seconds", [20.0, -1.0])
def test_an_interrupted_shard_is_kept(
    tmp_path: Path,
    tokenizer: VQModel,
    token_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
) -> None:
    monkeypatch.setattr(extraction, "SAVE_SECONDS", seconds)
    InterruptedTokenizer.calls.clear()
    interrupted = InterruptedTokenizer(tokenizer.config)
    interrupted.load_state_dict(tokenizer.state_dict())
    with pytest.raises(KeyboardInterrupt):
        extract(interrupted, "abc", IMAGES, tmp_path, CONFIG)
    first = [*InterruptedTokenizer.calls]
    assert (tmp_path / "train-00000.begun.npy").is_file()
    extract(interrupted, "abc", IMAGES, tmp_path, CONFIG)
    encoded = sum(first[:2]) + sum(InterruptedTokenizer.calls[3:])
    assert encoded == VIEWS_IN_ALL  # each view once
    assert contents(tmp_path) == contents(token_folder)


def test_progress_counts_views_up_to_the_total(tmp_path: Path, tokenizer: VQModel) -> None:
    calls: list[tuple[int, int]] = []
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (VIEWS_IN_ALL, VIEWS_IN_ALL)
    # Again: nothing is encoded, one call for each shard.
    calls.clear()
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=lambda *call: calls.append(call))
    assert [call[0] for call in calls] == [12, 24, 36, 40, 45]


class TerminatingTokenizer(VQModel):
    """Sends SIGTERM to its process in every `every`-th call of `encode`."""

    every, calls = 1, 0

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        cls = TerminatingTokenizer
        cls.calls += 1
        if cls.calls % cls.every == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().encode(images_BCHW)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_sigterm_stops_after_the_batch_and_loses_nothing(
    tmp_path: Path,
    tokenizer: VQModel,
    token_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:
    """Stopped again and again, it encodes no image twice."""
    terminating = TerminatingTokenizer(tokenizer.config)
    terminating.load_state_dict(tokenizer.state_dict())
    monkeypatch.setattr(TerminatingTokenizer, "every", every)
    monkeypatch.setattr(TerminatingTokenizer, "calls", 0)
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(20):
        try:
            extract(terminating, "abc", IMAGES, tmp_path, CONFIG)
            break
        except Stopped as stopped:
            assert str(stopped).startswith(f"{tmp_path}: stopped and saved")
            assert signal.getsignal(signal.SIGTERM) == before
    # Two views of batches in shards of 6, 6, 6, 2 images, and one view of 5 held-out images.
    assert TerminatingTokenizer.calls == 2 * (2 + 2 + 2 + 1) + 2
    assert contents(tmp_path) == contents(token_folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_begun_shard_is_encoded_again(
    tmp_path: Path, tokenizer: VQModel, token_folder: Path, damage: str
) -> None:
    def stop(done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, progress=stop)
    begun = tmp_path / "train-00000.begun.npy"
    content = begun.read_bytes()
    changed = {"cut": content[:-1], "empty": b"", "flip": content[:-1] + b"?"}[damage]
    begun.write_bytes(changed)
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(token_folder)


KILLED_WHILE_WRITING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from ctf.data.extraction import extract
from tests.data.tiny_tokens import *
replace, count = os.replace, 0
def kill(source, target):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
extract(make_tokenizer(), "abc", IMAGES, Path({folder!r}), CONFIG)
"""


def test_killed_while_writing_a_shard(
    tmp_path: Path, tokenizer: VQModel, token_folder: Path
) -> None:
    script = KILLED_WHILE_WRITING.format(
        tests=str(Path(__file__).parents[2]), at=4, folder=str(tmp_path)
    )
    process = subprocess.run([sys.executable, "-c", script], check=False)
    assert process.returncode == -signal.SIGKILL
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert names == {"manifest.json", "train-classes.npy", "train-00000.npy"}
    assert len(list(tmp_path.glob(".train-00001.npy.*.tmp"))) == 1
    extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(token_folder)  # the temporary file is gone, too


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
def test_a_folder_of_another_configuration_is_refused(
    token_folder: Path, change: dict[str, typing.Any], reason: str
) -> None:
    before = contents(token_folder)
    fields = {k: v for k, v in change.items() if k in ("views", "shard_images")}
    with pytest.raises(UserError, match=rf"{reason}\n.*choose another folder"):
        extract(
            make_tokenizer(change.get("codebook_size", 64)),
            change.get("tokenizer_hash", "abc"),
            Splits(Noise(20, change.get("seed", 0), change.get("classes", 3)), IMAGES.val),
            token_folder,
            dataclasses.replace(CONFIG, **fields),
            limit=change.get("limit"),
        )
    assert contents(token_folder) == before


def test_the_batch_size_may_change(token_folder: Path, tokenizer: VQModel) -> None:
    extract(tokenizer, "abc", IMAGES, token_folder, dataclasses.replace(CONFIG, batch_size=1))


@needs_bf16
def test_the_precision_is_part_of_the_manifest(
    token_folder: Path, tokenizer: VQModel, tmp_path: Path
) -> None:
    exact = extract(tokenizer, "abc", IMAGES, token_folder, CONFIG, precision="fp32")
    assert exact.precision == "fp32"  # the default
    low = extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG, precision="bf16")
    assert low.precision == json.loads((tmp_path / "manifest.json").read_text())["precision"]
    assert low == dataclasses.replace(exact, precision="bf16")
    for there, other in ((token_folder, "bf16"), (tmp_path, "auto")):
        before = contents(there)
        with pytest.raises(UserError, match="another configuration: precision was "):
            extract(tokenizer, "abc", IMAGES, there, CONFIG, precision=other)
        assert contents(there) == before
    tokens.check(tmp_path)


def test_manifests_of_earlier_versions_have_no_precision(
    token_folder: Path, tokenizer: VQModel, tmp_path: Path
) -> None:
    old = shutil.copytree(token_folder, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["precision"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    before = contents(old)
    assert extract(tokenizer, "abc", IMAGES, old, CONFIG).precision == "fp32"
    assert contents(old) == before and len(Tokens(old, "train", "abc")) == 20


def test_manifests_of_earlier_versions_have_no_background(
    tokenizer: VQModel, tmp_path: Path
) -> None:
    """It is recorded if it is not white; the fingerprints of the images have always covered it."""
    red = Noise(20, 3)
    red.background = (255, 0, 0)
    images = Splits(red, IMAGES.val)
    new = extract(tokenizer, "abc", images, tmp_path, CONFIG)
    assert new.background == "#ff0000"
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert content.pop("background") == "#ff0000"
    path.write_text(json.dumps(content))
    assert extract(tokenizer, "abc", images, tmp_path, CONFIG) == new
    assert "background" not in json.loads(path.read_text())


def test_bf16_is_refused_on_devices_without_it(
    tokenizer: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctf.common.precision.supports_bf16", lambda _: False)
    with pytest.raises(UserError, match="this cpu has no bfloat16 products"):
        extract(tokenizer, "abc", IMAGES, tmp_path / "t", CONFIG, precision="bf16")
    assert not (tmp_path / "t").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, tokenizer: VQModel) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"not a folder of tokens \(no manifest.json\); choose"):
        extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex"):
        extract(tokenizer, "abc", IMAGES, tmp_path / "thesis.tex", CONFIG)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    tokenizer = VQModel(dataclasses.replace(make_tokenizer().config, image_size=16))
    with pytest.raises(UserError, match=r"images of 8 pixels.* for 16; .*--image-size 16"):
        extract(tokenizer, "abc", IMAGES, tmp_path, CONFIG)


def test_invalid_configurations_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size: got 0"):
        TokensConfig(batch_size=0)
    with pytest.raises(UserError, match="shard_images: got -1"):
        TokensConfig(shard_images=-1)


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from ctf.common.errors import UserError
from ctf.data.extraction import extract
from tests.data.tiny_tokens import *
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    extract(make_tokenizer(), "abc", Splits(Noise(200, 0), IMAGES.val), Path({folder!r}),
            TokensConfig(shard_images=200))
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "train-00000.npy: the disk is full" in process.stdout
    assert not (tmp_path / "train-00000.npy").exists()
