"""Training of the classifier: it learns a toy set and resumes to the same bits."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import PLAIN, View
from ctf.evaluation.classifier import ClassifierConfig, load_classifier
from ctf.training import loop, metrics_log
from ctf.training.classifier import ClassifierTrainer, augment, held_out_accuracy, train_classifier
from tests.training.parted import assert_steps_agree

TINY = ClassifierConfig(width=16, steps=40, batch_size=32, warm_up=5, evaluate_every=20)


class Stripes(ImageSet):
    """Noisy stripes: across, down, or both."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        names = ("across", "down", "checks")
        super().__init__("stripes", names, np.arange(count) % 3, 16, f"stripes {count} {seed}")
        wave = np.where(np.arange(16) // 2 % 2, 60.0, -60.0)
        shapes = np.stack(
            [wave[:, None] + 0 * wave, wave + 0 * wave[:, None], wave[:, None] * wave / 60]
        )
        noise = random.normal(128, 20, (count, 16, 16, 3))
        self.pixels = (noise + shapes[self.classes_N][..., None]).clip(0, 255).astype(np.uint8)

    def read(self, indices: object, view: View = PLAIN) -> np.ndarray:
        pixels: np.ndarray = self.pixels[np.asarray(indices)]
        return pixels


@pytest.fixture(scope="module")
def stripes() -> Splits:
    return Splits(Stripes(300, 0), Stripes(90, 1))


@pytest.fixture(scope="module")
def trained(stripes: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    train_classifier(stripes, folder, TINY)
    return folder


def test_training_solves_a_separable_set(stripes: Splits, trained: Path) -> None:
    model = load_classifier(trained)
    assert model.class_names == ("across", "down", "checks")
    assert held_out_accuracy(model, stripes.val) > 0.95
    assert metrics_log.last_metrics(trained, "val")["accuracy"] > 0.95
    assert {p.name for p in trained.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    }


def test_interrupted_training_ends_with_the_same_bits(
    stripes: Splits, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(done: int, steps: int, metrics: object) -> None:
        if done == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(stripes, tmp_path / "run", TINY, progress=kill)
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000020.safetensors"]
    resumed: list[int] = []
    train_classifier(
        stripes, tmp_path / "run", TINY, progress=lambda done, *_: resumed.append(done)
    )
    assert resumed == [40]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.usefixtures("three_threads")
def test_a_step_in_parts_is_that_of_the_whole_batch(stripes: Splits) -> None:
    config = dataclasses.replace(TINY, batch_size=7)
    whole, in_parts = (ClassifierTrainer(stripes, config, torch.device("cpu")) for _ in range(2))
    assert_steps_agree(whole, in_parts, range(2), parts=3)


def test_finished_training_is_loaded_and_another_configuration_is_refused(
    stripes: Splits, trained: Path
) -> None:
    before = (trained / "model.safetensors").stat().st_mtime_ns
    train_classifier(stripes, trained, TINY)
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"config\.steps was 40, now 41"):
        train_classifier(stripes, trained, dataclasses.replace(TINY, steps=41))


def test_augment_shifts_and_flips_within_bounds() -> None:
    image = np.arange(6, dtype=np.uint8)[:, None] * 10 + np.arange(6, dtype=np.uint8)
    pixels = np.repeat(image[None, :, :, None], 3, axis=3).repeat(500, axis=0)
    random = np.random.default_rng(0)
    assert (augment(pixels, random, flip=False, shift=0) == pixels).all()
    seen = {p.tobytes() for p in augment(pixels, random, flip=True, shift=1)}
    expected = set()
    mirrored = np.pad(pixels[0], ((1, 1), (1, 1), (0, 0)), mode="reflect")
    for y in range(3):
        for x in range(3):
            moved = mirrored[y : y + 6, x : x + 6]
            expected |= {moved.tobytes(), moved[:, ::-1].tobytes()}
    assert seen == expected


def test_invalid_configurations_are_refused(stripes: Splits, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 16"):
        train_classifier(stripes, tmp_path / "a", dataclasses.replace(TINY, width=24))
    one = SimpleNamespace(train=SimpleNamespace(name="flat", class_names=("flat",)))
    with pytest.raises(UserError, match="2 classes or more"):
        train_classifier(one, tmp_path / "b", TINY)  # type: ignore[arg-type]
