"""Training of the classifier that scores samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.common import rng
from ctf.common.config import to_json
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import as_tensor
from ctf.evaluation.classifier import (
    BATCH,
    CHANNELS_PER_GROUP,
    Classifier,
    ClassifierConfig,
    classify,
    load_classifier,
    place,
)
from ctf.training import loop
from ctf.training.state import collect, restore


class ClassifierTrainer:
    """A classifier and its optimiser: a `loop.Trainable`."""

    def __init__(self, images: Splits, config: ClassifierConfig, device: torch.device) -> None:
        self.images, self.config, self.device = images, config, device
        torch.manual_seed(config.seed)
        model = Classifier(config.width, images.train.image_size, images.train.class_names)
        self.model = place(model, device)
        self.optimizer = loop.make_optimizer(
            self.model, config.learning_rate, config.betas, config.weight_decay
        )

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        c, train = self.config, self.images.train
        indices = loop.batch_indices(len(train), c.batch_size, c.seed, step)
        random = rng.generator(c.seed, 1, step)
        pixels = augment(train.read(indices), random, flip=c.flip, shift=c.shift)
        classes_B = torch.from_numpy(train.classes_N[indices]).to(self.device)
        logits_BK, _ = self.model(as_tensor(pixels, self.device))
        loss = F.cross_entropy(logits_BK, classes_B, label_smoothing=c.label_smoothing)
        rate = loop.learning_rate(
            step, c.steps, c.learning_rate, c.warm_up, "cosine", c.final_learning_rate
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = loop.update(
            self.optimizer, loss.detach(), rate, c.clip, step, "classifier's loss", indices
        )
        right_B = logits_BK.detach().argmax(1) == classes_B
        return {
            "loss": loss.detach(),
            "accuracy": right_B.float().mean(),
            "gradient_norm": norm,
            "learning_rate": rate,
            "images": c.batch_size,
        }

    def evaluate(self) -> Mapping[str, float]:
        return {"accuracy": held_out_accuracy(self.model, self.images.val)}

    def state(self) -> Mapping[str, Tensor]:
        return collect(model=self.model, optimizer=self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        restore(tensors, model=self.model, optimizer=self.optimizer)


def augment(
    pixels_BSSC: np.ndarray, random: np.random.Generator, *, flip: bool, shift: int
) -> np.ndarray:
    """Moves each picture by up to `shift` pixels each way, its border mirrored, and flips half of
    them where `flip` is set. uint8 (B, S, S, 3) -> the same shape."""
    batch, size = pixels_BSSC.shape[:2]
    offsets_2B1 = random.integers(-shift, shift + 1, (2, batch, 1))
    positions_2BS = np.abs(np.arange(size) + offsets_2B1)
    rows_BS, columns_BS = np.minimum(positions_2BS, 2 * (size - 1) - positions_2BS)
    flipped_B1 = random.random((batch, 1)) < 0.5 * flip
    columns_BS = np.where(flipped_B1, columns_BS[:, ::-1], columns_BS)
    picture_B11 = np.arange(batch)[:, None, None]
    moved: np.ndarray = pixels_BSSC[picture_B11, rows_BS[:, :, None], columns_BS[:, None, :]]
    return moved


def held_out_accuracy(model: Classifier, images: ImageSet) -> float:
    """Fraction of a set's pictures whose class is recognised."""
    right = 0
    for start in range(0, len(images), BATCH):
        indices = np.arange(start, min(start + BATCH, len(images)))
        classified = classify(model, images.read(indices))
        right += int((classified.classes_N == images.classes_N[indices]).sum())
    return right / len(images)


def train_classifier(
    images: Splits,
    folder: Path,
    config: ClassifierConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Classifier:
    """Trains a classifier into `folder`, or goes on where it was killed, or loads it if it is done.

    Writes config.json, metrics.jsonl, and model.safetensors in half precision.

    Raises:
        UserError: the pictures have one class only, or the folder belongs to something else.
    """
    config = config or ClassifierConfig()
    names = images.train.class_names
    if len(names) < 2:
        raise UserError(
            f"{images.train.name}: a classifier needs pictures of 2 classes or more, got "
            f"{len(names)}\nput the pictures of each class into a folder of its own"
        )
    if config.width < 1 or config.width % CHANNELS_PER_GROUP:
        raise UserError(f"width {config.width}: expected a multiple of {CHANNELS_PER_GROUP}")
    description = {
        "image_size": images.train.image_size,
        "class_names": list(names),
        "images": images.train.fingerprint,
        "config": to_json(config),
    }
    if loop.begin(folder, description):
        trainer = ClassifierTrainer(images, config, torch.device(device))
        loop.run(
            trainer, folder, config.steps, evaluate_every=config.evaluate_every, progress=progress
        )
        # Half precision: half the size; 11 bits are plenty for weights that are not trained on.
        weights = {k: v.half() for k, v in trainer.model.state_dict().items()}
        loop.finish(folder, weights, {})
    return load_classifier(folder, device)
