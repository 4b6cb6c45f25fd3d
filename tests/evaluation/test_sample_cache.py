"""Samples that are kept: whose class they are of, and that no kill at any moment changes them."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet
from ctf.data.images import open_images
from ctf.evaluation.sample_cache import Drawing, draw, draw_blocks
from ctf.pipelines.generation import BATCH_SIZE
from ctf.pipelines.pipeline import Pipeline
from tests.gallery import Gallery


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images("fashion-mnist").val


def ignore(done: int, total: int) -> None:
    pass


def expected(images: ImageSet, asked: Drawing) -> np.ndarray:
    gallery, classes_N = Gallery(images), asked.classes(10)
    numbers = [gallery.number(c, asked.seed + i) for i, c in enumerate(classes_N.tolist())]
    return images.read(numbers)


# --- classes --------------------------------------------------------------------------------------


def test_equal_counts() -> None:
    classes_N = Drawing(60).classes(3)
    assert classes_N.dtype == np.int64 and Counter(classes_N.tolist()) == {0: 20, 1: 20, 2: 20}
    assert np.array_equal(classes_N, Drawing(60, seed=5).classes(3))


@pytest.mark.parametrize("seed", [0, 7, -1, -(2**63), 2**62])
def test_classes_at_random(seed: int) -> None:
    classes_N = Drawing(10_000, seed, "uniform").classes(10)
    counts = np.bincount(classes_N, minlength=10)
    assert classes_N.dtype == np.int64 and len(counts) == 10
    assert counts.min() != counts.max() and abs(counts - 1000).max() < 150  # 5 deviations
    assert np.array_equal(classes_N, Drawing(10_000, seed, "uniform").classes(10))
    other = Drawing(10_000, seed + 1, "uniform").classes(10)
    assert 0.05 < (classes_N == other).mean() < 0.15


@pytest.mark.parametrize(("samples", "remedy"), [(25, "try 30"), (1, "try 10"), (9999, "10000")])
def test_counts_that_cannot_be_equal(samples: int, remedy: str) -> None:
    with pytest.raises(UserError, match=f"{samples} samples cannot be shared equally.*{remedy}"):
        Drawing(samples).classes(10)
    assert len(Drawing(samples, balance="uniform").classes(10)) == samples
    assert str(Drawing(samples).shared(10).samples) in remedy
    assert Drawing(samples, balance="uniform").shared(10).samples == samples


@pytest.mark.parametrize("balance", ["balanced", "uniform"])
@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples(samples: int, balance: Any) -> None:
    with pytest.raises(UserError, match=f"got {samples} samples, expected 1 or more"):
        Drawing(samples, balance=balance).classes(10)


# --- drawing --------------------------------------------------------------------------------------


def test_samples_are_drawn_and_kept(images: ImageSet, tmp_path: Path) -> None:
    asked = Drawing(200, seed=3, settings={"guidance": 1.5, "top_k": 0}, resize=32)
    gallery, seen = Gallery(images), []
    found = draw(gallery, asked, tmp_path, lambda *given: seen.append(given))
    assert (found.count, found.size, found.class_names) == (200, (32, 32), images.class_names)
    assert found.classes_N is not None and np.array_equal(found.classes_N, np.arange(200) % 10)
    pixels = np.concatenate(list(found.batches()))
    assert np.array_equal(pixels, expected(images, asked))
    assert gallery.sampled == [(i % 10, 3 + i) for i in range(200)]
    assert all(s == {"guidance": 1.5, "top_k": 0, "resize": 32} for s in gallery.settings)
    assert seen == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert os.listdir(tmp_path) == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as stored:  # as ADM's evaluator reads it
        assert np.array_equal(stored["arr_0"], pixels)
        assert np.array_equal(stored["arr_1"], found.classes_N)
    again = draw(gallery, asked, tmp_path, ignore)
    assert len(gallery.sampled) == 200 and again.fingerprint == found.fingerprint
    assert np.array_equal(np.concatenate(list(draw_blocks(gallery, asked))), pixels)


def test_a_pipeline_draws_each_from_its_own_seed(pipe: Pipeline, tmp_path: Path) -> None:
    asked = Drawing(BATCH_SIZE + 3, seed=11, balance="uniform", resize=16)
    found = draw(pipe, asked, tmp_path, ignore)
    pixels = np.concatenate(list(found.batches()))
    for i in (0, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 2):
        alone = pipe.sample([int(asked.classes(3)[i])], 11 + i, resize=16).images[0]
        assert abs(np.asarray(alone).astype(int) - pixels[i]).max() <= 1  # kernels may round


def test_settings_the_pipeline_does_not_have(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown setting 'guidence': did you mean 'guidance'"):
        draw(pipe, Drawing(3, settings={"guidence": 1.0}), tmp_path, ignore)
    assert os.listdir(tmp_path) == []


# --- kills ----------------------------------------------------------------------------------------

ASKED = Drawing(200)


def run_in_child(work: Callable[[], None]) -> int:
    """The exit code of a process that does it: -9 where it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is killed before what it does to files for the nth time."""
    left = iter(range(moment, -1, -1))

    def before(does: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), 9)
            return does(*args, **kwargs)

        return wrapped

    for module, name in (
        (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (np, "load"), (np, "save"),
        (np.lib.format, "write_array_header_1_0"), (shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, before(getattr(module, name)))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_at_every_step_it_ends_the_same(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While blocks are drawn, written, put together and removed."""
    draw(Gallery(images), ASKED, tmp_path / "whole", ignore)
    whole = files(tmp_path / "whole")
    codes, lost = [], []
    for moment in range(1000):
        folder = tmp_path / str(moment)

        def work(folder: Path = folder, moment: int = moment) -> None:
            killed_at(moment, monkeypatch)
            draw(Gallery(images), ASKED, folder, ignore)

        codes.append(run_in_child(work))
        kept = {name for name in files(folder) if not name.endswith(".tmp")}
        assert kept <= {"samples.npz", *(f"{start:08d}.npy" for start in range(0, 200, BATCH_SIZE))}
        if "samples.npz" in kept:
            assert (folder / "samples.npz").read_bytes() == whole["samples.npz"]
        gallery = Gallery(images)
        storage.remove_temporaries(folder)  # as every command does with its folder
        draw(gallery, ASKED, folder, ignore)
        assert files(folder) == whole
        lost.append(len(gallery.sampled))
        if codes[-1] == 0:
            break
    assert codes == [-9] * (len(codes) - 1) + [0] and len(codes) > 25
    assert lost == sorted(lost, reverse=True) and {*lost} == {200, 136, 72, 8, 0}


def test_interrupted_in_the_middle_of_a_block(images: ImageSet, tmp_path: Path) -> None:
    class Interrupted(Gallery):
        def sample(self, **given: Any) -> Any:
            if given["seed"] == 2 * BATCH_SIZE:
                raise KeyboardInterrupt
            return super().sample(**given)

    with pytest.raises(KeyboardInterrupt):
        draw(Interrupted(images), ASKED, tmp_path, ignore)
    gallery, seen = Gallery(images), []
    found = draw(gallery, ASKED, tmp_path, lambda *given: seen.append(given))
    assert (
        gallery.sampled[0] == (2 * BATCH_SIZE % 10, 2 * BATCH_SIZE) and len(gallery.sampled) == 72
    )
    assert seen == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert np.array_equal(np.concatenate(list(found.batches())), expected(images, ASKED))


def test_a_full_disk_is_told(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match=r"samples\.npz: the disk is full"):
        draw(Gallery(images), ASKED, tmp_path, ignore)
    monkeypatch.undo()
    gallery = Gallery(images)
    draw(gallery, ASKED, tmp_path, ignore)
    assert gallery.sampled == [] and os.listdir(tmp_path) == ["samples.npz"]
