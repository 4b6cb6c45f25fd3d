"""A small convolutional classifier, for the class accuracy of samples.

It scores small images, on which ImageNet networks are unreliable. Included are classifiers of
included image sets (`shipped_classifiers`).

Shapes: B batch, N images, S image size, K classes, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ctf.common import storage, threads
from ctf.common.config import from_json
from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.data.transforms import as_tensor
from ctf.pipelines.folder import SHIPPED as SHIPPED_MODELS
from ctf.pipelines.folder import to_channels_last

SUFFIX = "-classifier"  # of the folder, after the name of the image set
SHIPPED = SHIPPED_MODELS / f"fashion-mnist{SUFFIX}"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHANNELS_PER_GROUP = 16  # of the group normalisation
BATCH = 256  # images at a time for inference


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Architecture and training of a classifier. The defaults are those of Fashion-MNIST."""

    width: int = 32  # channels of the first stage; a multiple of 16
    steps: int = 7000
    batch_size: int = 128
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.001  # as a fraction of the peak
    warm_up: int = 200  # steps
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    label_smoothing: float = 0.1
    flip: bool = True  # horizontally, as augmentation
    shift: int = 2  # pixels at most in each direction, as augmentation
    evaluate_every: int = 1000  # steps
    seed: int = 0


class _Conv(nn.Conv2d):
    """A square convolution with weight standardisation (arXiv 1903.10520).

    With group normalisation it trains as fast as with batch normalisation.
    """

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(fan_in, fan_out, kernel, stride, (kernel - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        # Scaled by the fan-in, so that outputs have about the variance of the inputs.
        scale = torch.rsqrt(variance * self.weight[0].numel() + 1e-5)
        return F.conv2d(x, (self.weight - mean) * scale, None, self.stride, self.padding)


class _Block(nn.Module):
    """Residual block of two 3x3 convolutions that halves the size."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.conv1 = _Conv(fan_in, fan_out, 3, stride=2)
        self.norm1 = nn.GroupNorm(fan_out // CHANNELS_PER_GROUP, fan_out)
        self.conv2 = _Conv(fan_out, fan_out, 3)
        self.norm2 = nn.GroupNorm(fan_out // CHANNELS_PER_GROUP, fan_out)
        self.shortcut = _Conv(fan_in, fan_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        shortcut = self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))
        return F.relu(shortcut + self.norm2(self.conv2(inner)))


class Classifier(nn.Module):
    """Classifies images of `image_size` pixels into `class_names`.

    Group instead of batch normalisation: predictions do not depend on the batch. `digest` is a hash
    of the files that it was loaded from.
    """

    digest = ""

    def __init__(self, width: int, image_size: int, class_names: Sequence[str]) -> None:
        super().__init__()
        self.image_size, self.class_names = image_size, tuple(class_names)
        self.stem = _Conv(3, width, 4, stride=2)
        self.norm = nn.GroupNorm(width // CHANNELS_PER_GROUP, width)
        self.blocks = nn.Sequential(_Block(width, 2 * width), _Block(2 * width, 4 * width))
        self.head = nn.Linear(4 * width, len(self.class_names))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and pooled features (B, D = 4 * width), which are not negative.

        Args:
            images_BCHW: images (B, 3, S, S) in [-1, 1].
        """
        features_BD = self.blocks(F.relu(self.norm(self.stem(images_BCHW)))).mean(dim=(2, 3))
        return self.head(features_BD), features_BD


@torch.inference_mode()
def classify(model: Classifier, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    """Return the most likely class of each image, (N,) int64.

    Args:
        model: a classifier for images of size S.
        images: uint8 (N, S, S, 3) or PIL images.

    Raises:
        UserError: there are no images, or they have another size.
    """
    device = model.head.weight.device
    classes = []

    def compute(pixels_BSSC: np.ndarray) -> np.ndarray:
        logits_BK, _ = model(as_tensor(pixels_BSSC, device))
        return logits_BK.argmax(dim=1).cpu().numpy()

    with threads.team(threads.pays(device)):
        for start in range(0, len(images), BATCH):
            pixels_BSSC = _as_pixels(model, images[start : start + BATCH])
            classes += threads.over_parts(compute, pixels_BSSC)
    if not classes:
        raise UserError("got no images to classify, expected 1 or more")
    return np.concatenate(classes)


def _as_pixels(model: Classifier, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    size = model.image_size
    arrays = [np.asarray(x.convert("RGB")) if isinstance(x, Image.Image) else x for x in images]
    for pixels in arrays:
        if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
            raise UserError(
                f"got an image of shape {pixels.shape}, {pixels.dtype}; the classifier takes "
                f"{size}x{size} 8-bit RGB\nuse one that was trained at that size"
            )
    return np.stack(arrays)


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> Classifier:
    """Load the classifier in `folder` (config.json, model.safetensors), frozen, in float32.

    Raises:
        UserError: a file is missing or damaged, or is not that of a classifier.
    """
    path = folder / CONFIG
    stored = storage.load_json(path)
    try:
        size, names = stored["image_size"], stored["class_names"]
        config = from_json(ClassifierConfig, stored["config"], f"{path}: config")
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the configuration of a classifier") from None
    model = Classifier(config.width, size, names)
    tensors, _ = storage.load_tensors(folder / WEIGHTS)
    load_strict(model, {k: v.float() for k, v in tensors.items()}, folder / WEIGHTS)
    files = (folder / CONFIG, folder / WEIGHTS)
    model.digest = storage.hash_json([storage.hash_file(file) for file in files])
    return to_channels_last(model, torch.device(device)).eval().requires_grad_(False)


def shipped_classifiers() -> dict[str, Path]:
    """Return the folders of the included classifiers, by the image set each was trained on."""
    return {
        folder.name.removesuffix(SUFFIX): folder
        for folder in sorted(SHIPPED_MODELS.glob(f"*{SUFFIX}"))
    }


def shipped_classifier(device: torch.device | str = "cpu") -> Classifier:
    """Load the included classifier of Fashion-MNIST: 32x32 pixels, 10 classes."""
    return load_classifier(SHIPPED, device)
