"""The classifier: independent of the batch, for any image size; the included one is accurate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.images import open_images
from ctf.data.transforms import as_tensor
from ctf.evaluation.classifier import (
    SHIPPED,
    Classifier,
    classify,
    load_classifier,
    shipped_classifier,
)
from ctf.training.classifier import held_out_accuracy
from tests.evaluation.helpers import noise


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(16, 16, ("across", "down", "checks")).requires_grad_(False)


@pytest.mark.usefixtures("three_threads")
def test_predictions_in_parts_are_in_order(model: Classifier) -> None:
    random = np.random.default_rng(1)
    size = model.image_size
    images = random.integers(0, 256, (10, size, size, 3), dtype=np.uint8)
    parted = classify(model, images)
    torch.set_num_threads(1)
    assert parted.tolist() == classify(model, images).tolist()


def test_predictions_do_not_depend_on_the_batch(model: Classifier) -> None:
    pixels = noise(7, 0, 16)
    logits_NK, features_ND = model(as_tensor(pixels))
    assert logits_NK.shape == (7, 3) and features_ND.shape == (7, 64)
    assert (features_ND >= 0).all()
    logits_1K, features_1D = model(as_tensor(pixels[4:5]))
    torch.testing.assert_close(logits_1K[0], logits_NK[4], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(features_1D[0], features_ND[4], rtol=1e-3, atol=1e-5)
    classes_N = classify(model, pixels)
    assert classes_N.dtype == np.int64
    np.testing.assert_array_equal(classes_N, logits_NK.argmax(1).numpy())
    np.testing.assert_array_equal(classify(model, [Image.fromarray(p) for p in pixels]), classes_N)


@pytest.mark.parametrize("size", [8, 9, 10, 28])
def test_any_image_size_works(size: int) -> None:
    model = Classifier(16, size, ("a", "b"))
    assert classify(model, [Image.new("RGB", (size, size))]).shape == (1,)


def test_invalid_images_and_folders_are_refused(model: Classifier, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(32, 32, 3\).*16x16"):
        classify(model, [Image.new("RGB", (32, 32))])
    with pytest.raises(UserError, match="float64"):
        classify(model, np.zeros((1, 16, 16, 3)))
    with pytest.raises(UserError, match="no images"):
        classify(model, [])
    with pytest.raises(UserError, match="not found"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(UserError, match="not the configuration of a classifier"):
        load_classifier(tmp_path)


def test_included_classifier_is_accurate_on_the_test_set() -> None:
    images = open_images("fashion-mnist").val
    model = shipped_classifier()
    assert model.class_names == images.class_names
    assert held_out_accuracy(model, images) >= 0.92
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 1_000_000
