"""Training of the classifier that scores samples.

Shapes: B batch, S image size, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf.common import rng, threads
from ctf.common.config import to_json
from ctf.common.distributed import World
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import from_pixels
from ctf.evaluation.classifier import (
    BATCH,
    CHANNELS_PER_GROUP,
    Classifier,
    ClassifierConfig,
    classify,
    load_classifier,
)
from ctf.pipelines.folder import to_channels_last
from ctf.training import loop, optim
from ctf.training.batches import Batch, Batches
from ctf.training.state import Part


class ClassifierTrainer:
    """A classifier and its optimizer: a `loop.Trainable`."""

    def __init__(self, images: Splits, config: ClassifierConfig, device: torch.device) -> None:
        self.images, self.config = images, config
        torch.manual_seed(config.seed)
        model = Classifier(config.width, images.train.image_size, images.train.class_names)
        self.model = to_channels_last(model, device)
        self.batches = Batches(self.read_batch, config.steps, device)
        self.in_parts = threads.pays(device)
        self.checks = optim.Checks(World(device=device))
        self.optimizer = optim.make_optimizer(
            self.model, config.learning_rate, config.betas, config.weight_decay
        )

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take an optimizer step on the cross-entropy of augmented images."""
        c = self.config
        indices_B, batch = self.batches(step)

        def compute(pixels_BSSC: Tensor, classes_B: Tensor) -> optim.Computed:
            logits_BK, _ = self.model(from_pixels(pixels_BSSC))
            loss = F.cross_entropy(logits_BK, classes_B, label_smoothing=c.label_smoothing)
            correct_B = logits_BK.argmax(1) == classes_B
            return {"loss": loss, "accuracy": correct_B.float().mean()}, []

        rate = optim.learning_rate(
            step, c.steps, c.learning_rate, c.warm_up, "cosine", c.final_learning_rate
        )
        self.optimizer.zero_grad(set_to_none=True)
        means, _ = optim.backward(compute, batch, self.model.parameters())
        norm = optim.update(
            self.optimizer, means["loss"], rate, c.clip,
            step=step, name="classifier's loss", images_B=indices_B, checks=self.checks,
        )  # fmt: skip
        return {
            **means,
            "gradient_norm": norm,
            "learning_rate": rate,
            "images": c.batch_size,
        }

    def read_batch(self, step: int) -> Batch:
        """Return the indices of the images, their augmented pixels and their classes."""
        c, train = self.config, self.images.train
        indices_B = optim.batch_indices(len(train), c.batch_size, c.seed, step)
        random = rng.generator(c.seed, 1, step)
        pixels_BSSC = augment(train.read(indices_B), random, flip=c.flip, shift=c.shift)
        return indices_B, [
            torch.from_numpy(pixels_BSSC), torch.from_numpy(train.classes_N[indices_B])
        ]  # fmt: skip

    def check(self) -> None:
        """Raise a UserError if the loss or the gradient of a step since was not finite."""
        self.checks.check()

    def evaluate(self) -> Mapping[str, float]:
        """Return the accuracy on held-out images."""
        return {"accuracy": held_out_accuracy(self.model, self.images.val)}

    def parts(self) -> Mapping[str, Part]:
        """Return all that resuming needs."""
        return {"model": self.model, "optimizer": self.optimizer}


def augment(
    pixels_BSSC: np.ndarray, random: np.random.Generator, *, flip: bool, shift: int
) -> np.ndarray:
    """Return images, uint8 (B, S, S, 3), each shifted by up to `shift` pixels either way.

    Borders are reflected. With `flip`, half of the images are mirrored.
    """
    batch, size = pixels_BSSC.shape[:2]
    offsets_2B1 = random.integers(-shift, shift + 1, (2, batch, 1))
    positions_2BS = np.abs(np.arange(size) + offsets_2B1)
    rows_BS, columns_BS = np.minimum(positions_2BS, 2 * (size - 1) - positions_2BS)
    flipped_B1 = random.random((batch, 1)) < 0.5 * flip
    columns_BS = np.where(flipped_B1, columns_BS[:, ::-1], columns_BS)
    image_B11 = np.arange(batch)[:, None, None]
    shifted: np.ndarray = pixels_BSSC[image_B11, rows_BS[:, :, None], columns_BS[:, None, :]]
    return shifted


def held_out_accuracy(model: Classifier, images: ImageSet) -> float:
    """Return the fraction of images that are classified correctly."""
    correct = 0
    for start in range(0, len(images), BATCH):
        indices = np.arange(start, min(start + BATCH, len(images)))
        correct += int((classify(model, images.read(indices)) == images.classes_N[indices]).sum())
    return correct / len(images)


def train_classifier(
    images: Splits,
    folder: Path,
    config: ClassifierConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Classifier:
    """Train a classifier into `folder`, resume its training, or load it if it is finished.

    Writes config.json, metrics.jsonl, and model.safetensors in half precision.

    Raises:
        UserError: There is only one class, or the folder belongs to something else.
    """
    config = config or ClassifierConfig()
    names = images.train.class_names
    if len(names) < 2:
        raise UserError(
            f"{images.train.name}: a classifier needs images of 2 classes or more, got "
            f"{len(names)}\nput the images of each class into a folder of its own"
        )
    if config.width < 1 or config.width % CHANNELS_PER_GROUP:
        raise UserError(f"width {config.width}: expected a multiple of {CHANNELS_PER_GROUP}")
    images = images.as_recorded_in(folder / "config.json", "images")
    description = {
        "image_size": images.train.image_size,
        "class_names": list(images.train.class_names),
        "images": images.train.fingerprint,
        "config": to_json(config),
    }
    with loop.hold(folder, description) as unfinished:
        if unfinished:
            trainer = ClassifierTrainer(images, config, torch.device(device))
            loop.run(
                trainer, folder, config.steps,
                evaluate_every=config.evaluate_every, progress=progress,
            )  # fmt: skip
            # Half the size; the 11 bits of half precision are enough for weights that stay fixed.
            weights = {k: v.half() for k, v in trainer.model.state_dict().items()}
            loop.finish(folder, weights)
    return load_classifier(folder, device)
