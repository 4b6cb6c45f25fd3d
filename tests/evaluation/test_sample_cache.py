"""Cached samples: their classes, and that a kill at any moment does not change them."""

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
from ctf.evaluation.sample_cache import GenerationConfig, cached_samples, generate
from ctf.pipelines.generation import BATCH_SIZE
from ctf.pipelines.pipeline import Pipeline
from tests.evaluation.helpers import RealImages


def ignore(done: int, total: int) -> None:
    pass


def expected(images: ImageSet, config: GenerationConfig) -> np.ndarray:
    pipe, classes_N = RealImages(images), config.classes(10)
    numbers = [pipe.number(c, config.seed + i) for i, c in enumerate(classes_N.tolist())]
    return images.read(numbers)


# --- classes --------------------------------------------------------------------------------------


def test_balanced_classes_have_equal_counts() -> None:
    classes_N = GenerationConfig(60).classes(3)
    assert classes_N.dtype == np.int64 and Counter(classes_N.tolist()) == {0: 20, 1: 20, 2: 20}
    assert np.array_equal(classes_N, GenerationConfig(60, seed=5).classes(3))


@pytest.mark.parametrize("seed", [0, 7, -1, -(2**63), 2**62])
def test_uniform_classes_are_random_and_depend_on_the_seed(seed: int) -> None:
    classes_N = GenerationConfig(10_000, seed, "uniform").classes(10)
    counts = np.bincount(classes_N, minlength=10)
    assert classes_N.dtype == np.int64 and len(counts) == 10
    assert counts.min() != counts.max() and abs(counts - 1000).max() < 150  # 5 deviations
    assert np.array_equal(classes_N, GenerationConfig(10_000, seed, "uniform").classes(10))
    other = GenerationConfig(10_000, seed + 1, "uniform").classes(10)
    assert 0.05 < (classes_N == other).mean() < 0.15


@pytest.mark.parametrize(("samples", "remedy"), [(25, "try 30"), (1, "try 10"), (9999, "10000")])
def test_balanced_classes_need_a_multiple_of_their_number(samples: int, remedy: str) -> None:
    with pytest.raises(UserError, match=f"{samples} samples cannot be split equally.*{remedy}"):
        GenerationConfig(samples).classes(10)
    assert len(GenerationConfig(samples, balance="uniform").classes(10)) == samples
    assert str(GenerationConfig(samples).rounded_up(10).samples) in remedy
    assert GenerationConfig(samples, balance="uniform").rounded_up(10).samples == samples


@pytest.mark.parametrize("balance", ["balanced", "uniform"])
@pytest.mark.parametrize("samples", [0, -3])
def test_less_than_one_sample_is_refused(samples: int, balance: Any) -> None:
    with pytest.raises(UserError, match=f"got {samples} samples, expected 1 or more"):
        GenerationConfig(samples, balance=balance).classes(10)


# --- generation -----------------------------------------------------------------------------------


def test_samples_are_generated_once_and_cached(images: ImageSet, tmp_path: Path) -> None:
    config = GenerationConfig(200, seed=3, settings={"guidance": 1.5, "top_k": 0}, resize=32)
    pipe, calls = RealImages(images), []
    samples = cached_samples(pipe, config, tmp_path, lambda *args: calls.append(args))
    assert (samples.count, samples.size, samples.class_names) == (200, (32, 32), images.class_names)
    assert samples.classes_N is not None and np.array_equal(samples.classes_N, np.arange(200) % 10)
    pixels = np.concatenate(list(samples.batches()))
    assert np.array_equal(pixels, expected(images, config))
    assert pipe.sampled == [(i % 10, 3 + i) for i in range(200)]
    assert all(s == {"guidance": 1.5, "top_k": 0, "resize": 32} for s in pipe.settings)
    assert calls == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert os.listdir(tmp_path) == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as stored:  # as ADM's evaluator reads it
        assert np.array_equal(stored["arr_0"], pixels)
        assert np.array_equal(stored["arr_1"], samples.classes_N)
    again = cached_samples(pipe, config, tmp_path, ignore)
    assert len(pipe.sampled) == 200 and again.fingerprint == samples.fingerprint
    assert np.array_equal(np.concatenate(list(generate(pipe, config))), pixels)


def test_each_sample_is_generated_from_its_own_seed(pipe: Pipeline, tmp_path: Path) -> None:
    config = GenerationConfig(BATCH_SIZE + 3, seed=11, balance="uniform", resize=16)
    samples = cached_samples(pipe, config, tmp_path, ignore)
    pixels = np.concatenate(list(samples.batches()))
    for i in (0, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 2):
        alone = pipe.sample([int(config.classes(3)[i])], 11 + i, resize=16).images[0]
        assert abs(np.asarray(alone).astype(int) - pixels[i]).max() <= 1  # kernels may round


def test_unknown_settings_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown setting 'guidence': did you mean 'guidance'"):
        cached_samples(pipe, GenerationConfig(3, settings={"guidence": 1.0}), tmp_path, ignore)
    assert os.listdir(tmp_path) == []


# --- kills ----------------------------------------------------------------------------------------

CONFIG = GenerationConfig(200)


def run_in_child(work: Callable[[], None]) -> int:
    """Run `work` in a child process and return its exit code: -9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill this process before its nth operation on files from now on."""
    left = iter(range(moment, -1, -1))

    def before(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), 9)
            return operation(*args, **kwargs)

        return wrapped

    for module, name in (
        (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (np, "load"), (np, "save"),
        (np.lib.format, "write_array_header_1_0"), (shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, before(getattr(module, name)))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_kill_at_any_moment_does_not_change_the_samples(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While blocks are generated, written, joined and removed."""
    cached_samples(RealImages(images), CONFIG, tmp_path / "whole", ignore)
    whole = files(tmp_path / "whole")
    codes, repeated = [], []
    for moment in range(1000):
        folder = tmp_path / str(moment)

        def work(folder: Path = folder, moment: int = moment) -> None:
            killed_at(moment, monkeypatch)
            cached_samples(RealImages(images), CONFIG, folder, ignore)

        codes.append(run_in_child(work))
        names = {name for name in files(folder) if not name.endswith(".tmp")}
        assert names <= {
            "samples.npz",
            *(f"{start:08d}.npy" for start in range(0, 200, BATCH_SIZE)),
        }
        if "samples.npz" in names:
            assert (folder / "samples.npz").read_bytes() == whole["samples.npz"]
        pipe = RealImages(images)
        storage.remove_temporaries(folder)  # as every command does
        cached_samples(pipe, CONFIG, folder, ignore)
        assert files(folder) == whole
        repeated.append(len(pipe.sampled))
        if codes[-1] == 0:
            break
    assert codes == [-9] * (len(codes) - 1) + [0] and len(codes) > 25
    assert repeated == sorted(repeated, reverse=True) and {*repeated} == {200, 136, 72, 8, 0}


def test_interruption_loses_only_the_batch_in_progress(images: ImageSet, tmp_path: Path) -> None:
    class Interrupted(RealImages):
        def sample(self, **arguments: Any) -> Any:
            if arguments["seed"] == 2 * BATCH_SIZE:
                raise KeyboardInterrupt
            return super().sample(**arguments)

    with pytest.raises(KeyboardInterrupt):
        cached_samples(Interrupted(images), CONFIG, tmp_path, ignore)
    pipe, calls = RealImages(images), []
    samples = cached_samples(pipe, CONFIG, tmp_path, lambda *args: calls.append(args))
    assert pipe.sampled[0] == (2 * BATCH_SIZE % 10, 2 * BATCH_SIZE) and len(pipe.sampled) == 72
    assert calls == [(64, 200), (128, 200), (192, 200), (200, 200)]
    assert np.array_equal(np.concatenate(list(samples.batches())), expected(images, CONFIG))


def test_a_full_disk_is_a_user_error(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match=r"samples\.npz: the disk is full"):
        cached_samples(RealImages(images), CONFIG, tmp_path, ignore)
    monkeypatch.undo()
    pipe = RealImages(images)
    cached_samples(pipe, CONFIG, tmp_path, ignore)
    assert pipe.sampled == [] and os.listdir(tmp_path) == ["samples.npz"]
