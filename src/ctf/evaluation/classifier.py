"""A small convolutional classifier: which class does a (sampled) picture look like?

It scores samples of small pictures, for which ImageNet networks are a poor judge. The shipped one
(`shipped_classifier`) was trained on Fashion-MNIST.

Shapes: B batch, N pictures, S image size, K classes, D features.
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

from ctf.common import storage
from ctf.common.config import from_json
from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.data.transforms import as_tensor

SHIPPED = Path(__file__).parents[1] / "shipped" / "fashion-mnist-classifier"
CHANNELS_PER_GROUP = 16  # of the normalisation
BATCH = 256  # pictures at once when nothing is trained


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is built and trained. The defaults are those of the shipped one."""

    width: int = 32  # channels of the first stage; a multiple of 16
    steps: int = 7000
    batch_size: int = 128
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.001  # of the peak
    warm_up: int = 200  # steps
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    label_smoothing: float = 0.1
    flip: bool = True  # a mirrored picture shows the same class
    shift: int = 2  # pixels at most, up, down and sideways
    evaluate_every: int = 1000  # steps
    seed: int = 0


class _Conv(nn.Conv2d):
    """A square convolution whose filters are standardised before use (arXiv 1903.10520).

    With group normalisation it learns as fast as with batch normalisation.
    """

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(fan_in, fan_out, kernel, stride, (kernel - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        # The outputs get about the variance of the inputs, whatever the number of the weights.
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
    """Pictures of `image_size` pixels -> one of `class_names`.

    Group instead of batch normalisation: a picture is judged alike in any batch.
    """

    def __init__(self, width: int, image_size: int, class_names: Sequence[str]) -> None:
        super().__init__()
        self.image_size, self.class_names = image_size, tuple(class_names)
        self.stem = _Conv(3, width, 4, stride=2)
        self.norm = nn.GroupNorm(width // CHANNELS_PER_GROUP, width)
        self.blocks = nn.Sequential(_Block(width, 2 * width), _Block(2 * width, 4 * width))
        self.head = nn.Linear(4 * width, len(self.class_names))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and pooled features (B, D = 4 * width), those not negative.

        Args: images (B, 3, S, S) in [-1, 1].
        """
        features_BD = self.blocks(F.relu(self.norm(self.stem(images_BCHW)))).mean(dim=(2, 3))
        return self.head(features_BD), features_BD


@dataclasses.dataclass(frozen=True)
class Classified:
    """What a classifier says of N pictures."""

    classes_N: np.ndarray  # int64, the most likely class
    probabilities_NK: np.ndarray  # float32
    features_ND: np.ndarray  # float32, pooled, before the last layer


@torch.inference_mode()
def classify(model: Classifier, images: np.ndarray | Sequence[Image.Image]) -> Classified:
    """Args: images uint8 (N, S, S, 3) or N pictures of S x S pixels, S the classifier's size.

    Raises:
        UserError: there are none, or they are of another size.
    """
    device = model.head.weight.device
    probabilities, features = [], []
    for start in range(0, len(images), BATCH):
        logits_BK, features_BD = model(
            as_tensor(_pixels(model, images[start : start + BATCH]), device)
        )
        probabilities.append(logits_BK.softmax(dim=1).cpu())
        features.append(features_BD.cpu())
    if not probabilities:
        raise UserError("got no pictures to classify")
    probabilities_NK = torch.cat(probabilities).numpy()
    return Classified(probabilities_NK.argmax(1), probabilities_NK, torch.cat(features).numpy())


def _pixels(model: Classifier, images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    size = model.image_size
    arrays = [np.asarray(x.convert("RGB")) if isinstance(x, Image.Image) else x for x in images]
    for pixels in arrays:
        if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
            raise UserError(
                f"got a picture of shape {pixels.shape}, {pixels.dtype}; the classifier takes "
                f"{size}x{size} RGB of 8 bits\nuse one that was trained at that size"
            )
    return np.stack(arrays)


def place(model: Classifier, device: torch.device) -> Classifier:
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier in `folder` (config.json, model.safetensors), frozen, in single precision."""
    path = folder / "config.json"
    stored = storage.load_json(path)
    try:
        size, names = stored["image_size"], stored["class_names"]
        config = from_json(ClassifierConfig, stored["config"], f"{path}: config")
    except (KeyError, TypeError):
        raise UserError(f"{path}: not the configuration of a classifier") from None
    model = Classifier(config.width, size, names)
    tensors, _ = storage.load_tensors(folder / "model.safetensors")
    weights = {k: v.float() for k, v in tensors.items()}
    load_strict(model, weights, folder / "model.safetensors")
    return place(model, torch.device(device)).eval().requires_grad_(False)


def shipped_classifier(device: torch.device | str = "cpu") -> Classifier:
    """The classifier of Fashion-MNIST that comes with the package; 32x32 pixels, 10 classes."""
    return load_classifier(SHIPPED, device)
