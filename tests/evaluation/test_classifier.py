"""The classifier: learns a toy set, resumes to the same bits, and the shipped one is good."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet, Splits
from ctf.data.images import open_images
from ctf.data.transforms import PLAIN, View
from ctf.evaluation.classifier import (
    SHIPPED,
    Classifier,
    ClassifierConfig,
    classify,
    load_classifier,
    shipped_classifier,
)
from ctf.training import loop, metrics_log
from ctf.training.classifier import augment, held_out_accuracy, train_classifier

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


def test_learns_a_separable_set(stripes: Splits, trained: Path) -> None:
    model = load_classifier(trained)
    assert model.class_names == ("across", "down", "checks")
    assert held_out_accuracy(model, stripes.val) > 0.95
    assert metrics_log.last_metrics(trained, "val")["accuracy"] > 0.95
    assert {p.name for p in trained.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    }


def test_interrupted_equals_uninterrupted(
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


def test_a_finished_run_is_loaded_and_another_configuration_refused(
    stripes: Splits, trained: Path
) -> None:
    before = (trained / "model.safetensors").stat().st_mtime_ns
    train_classifier(stripes, trained, TINY)
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"config\.steps was 40, now 41"):
        train_classifier(stripes, trained, dataclasses.replace(TINY, steps=41))


def test_arrays_and_pictures_are_judged_alike_in_any_batch(stripes: Splits, trained: Path) -> None:
    model = load_classifier(trained)
    pixels = stripes.val.read(np.arange(7))
    together = classify(model, pixels)
    assert together.classes_N.dtype == np.int64
    assert together.probabilities_NK.shape == (7, 3) and together.features_ND.shape == (7, 64)
    assert together.probabilities_NK.sum(1) == pytest.approx(np.ones(7))
    assert (together.features_ND >= 0).all()
    alone = classify(model, [Image.fromarray(pixels[4])])
    np.testing.assert_allclose(alone.probabilities_NK[0], together.probabilities_NK[4], rtol=1e-4)
    np.testing.assert_allclose(alone.features_ND[0], together.features_ND[4], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [8, 9, 10, 28])
def test_takes_any_size(size: int) -> None:
    model = Classifier(16, size, ("a", "b"))
    assert classify(model, [Image.new("RGB", (size, size))]).probabilities_NK.shape == (1, 2)


def test_augment_moves_and_flips_within_bounds() -> None:
    picture = np.arange(6, dtype=np.uint8)[:, None] * 10 + np.arange(6, dtype=np.uint8)
    pixels = np.repeat(picture[None, :, :, None], 3, axis=3).repeat(500, axis=0)
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


def test_bad_input(stripes: Splits, trained: Path, tmp_path: Path) -> None:
    model = load_classifier(trained)
    with pytest.raises(UserError, match=r"\(32, 32, 3\).*16x16"):
        classify(model, [Image.new("RGB", (32, 32))])
    with pytest.raises(UserError, match="float64"):
        classify(model, np.zeros((1, 16, 16, 3)))
    with pytest.raises(UserError, match="no pictures"):
        classify(model, [])
    with pytest.raises(UserError, match="multiple of 16"):
        train_classifier(stripes, tmp_path / "a", dataclasses.replace(TINY, width=24))
    one = SimpleNamespace(train=SimpleNamespace(name="flat", class_names=("flat",)))
    with pytest.raises(UserError, match="2 classes or more"):
        train_classifier(one, tmp_path / "b", TINY)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not found"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(UserError, match="not the configuration of a classifier"):
        load_classifier(tmp_path)


def test_the_shipped_classifier_recognises_the_test_pictures() -> None:
    images = open_images("fashion-mnist").val
    model = shipped_classifier()
    assert model.class_names == images.class_names
    assert held_out_accuracy(model, images) >= 0.92
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 1_000_000
