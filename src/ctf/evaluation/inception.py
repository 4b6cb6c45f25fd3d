"""The Inception network that defines FID, sFID and the Inception Score.

The frozen TensorFlow graph of 2015-12-05 (`classify_image_graph_def.pb`), which ADM's evaluator
(openai/guided-diffusion, evaluations/evaluator.py) runs, and which pytorch-fid and torch-fidelity
converted to PyTorch. The convolutions are those of "Rethinking the Inception Architecture for
Computer Vision" (arXiv 1512.00567). It differs from any other Inception v3:

- Images of any size are resized to 299 x 299 by TensorFlow 1's bilinear filter, which places pixels
  on the grid points instead of between them; then (x - 128) / 128.
- Average pooling excludes padding (pytorch-fid: FIDInceptionA, C and E_1).
- The last block uses max pooling instead (pytorch-fid: FIDInceptionE_2).
- 1008 outputs; ADM and torch-fidelity ("logits_unbiased") omit their bias.
- `mixed_6/conv:0`, the features of sFID, is the first branch of `Mixed_6d`, by the names in
  torch-fidelity's util_convert_inception_weights.py. In the graph, a convolution `name` consists of
  the nodes name/Conv2D, name/batchnorm and name, so these are features after the ReLU. The maps of
  a block begin with those of its first branch.

Layers have their names in the weights file of pytorch-fid and torch-fidelity.

Shapes: B images, C channels, H height, W width, D features, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.evaluation.lite0 import fold_batch_norm
from ctf.pipelines.folder import to_channels_last

IMAGE_SIZE = 299
POOLED_CHANNELS = 2048  # the graph's pool_3
SPATIAL_CHANNELS = 7  # of mixed_6/conv at 17 x 17 positions: 2023 features, about as many as pooled
CLASSES = 1008

# File names that pytorch-fid and torch-fidelity use in the cache of torch.hub, with the first
# digits of the SHA-256.
WEIGHTS_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
WEIGHTS_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILES[0]}"
)


def resize_bilinear(images_BCHW: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear` without aligned corners: (B, C, size, size) float32.

    Samples pixel i at i * H / size, without the half-pixel offset of other implementations and
    without antialiasing. Columns are interpolated before rows, as in TensorFlow
    (core/kernels/resize_bilinear_op.cc).
    """
    x = images_BCHW.float()
    for dim in (3, 2):
        length = x.shape[dim]
        # In single precision, as in TensorFlow.
        at = torch.arange(size, device=x.device) * torch.tensor(length / size, dtype=torch.float32)
        low = at.long()
        high = (low + 1).clamp(max=length - 1)
        fraction = (at - low).view(-1, *[1] * (3 - dim))
        lower, upper = x.index_select(dim, low), x.index_select(dim, high)
        x = lower + (upper - lower) * fraction
    return x


class _Conv(nn.Conv2d):
    """A convolution with its batch normalisation folded in, then ReLU.

    Stride 1 keeps the size; at stride 2, or if not `padded`, there is no padding.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padded: bool = True,
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        super().__init__(fan_in, fan_out, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    """Average over the 3 x 3 neighbours that exist; the size stays."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool_halving(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


Branches = Mapping[str, Sequence[tuple[int, tuple[int, int]]]]


class _Block(nn.ModuleDict):
    """Parallel branches of convolutions, concatenated.

    branches: output channels and kernel of each convolution, by the branch's name. "branch_pool"
        average-pools its input first.
    halves: each branch ends at stride 2, and the max-pooled input is another branch.
    """

    def __init__(self, fan_in: int, branches: Branches, halves: bool = False) -> None:
        super().__init__()
        self.halves = halves
        self.layers: dict[str, list[str]] = {}
        for branch, convs in branches.items():
            numbered = [f"{branch}_{i}" for i in range(1, len(convs) + 1)]
            self.layers[branch] = names = numbered if len(convs) > 1 else [branch]
            width = fan_in
            for name, (channels, kernel) in zip(names, convs, strict=True):
                self[name] = _Conv(
                    width, channels, kernel, 2 if halves and name == names[-1] else 1
                )
                width = channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, names in self.layers.items():
            y = average_pool(x) if branch == "branch_pool" else x
            for name in names:
                y = self[name](y)
            outputs.append(y)
        return torch.cat([*outputs, _max_pool_halving(x)] if self.halves else outputs, dim=1)


def _block_a(fan_in: int, pooled: int) -> _Block:
    """At 35 x 35; 224 + `pooled` channels."""
    branches: Branches = {
        "branch1x1": [(64, (1, 1))],
        "branch5x5": [(48, (1, 1)), (64, (5, 5))],
        "branch3x3dbl": [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))],
        "branch_pool": [(pooled, (1, 1))],
    }
    return _Block(fan_in, branches)


def _block_b() -> _Block:
    """From 35 x 35 to 17 x 17; 768 channels."""
    branches: Branches = {
        "branch3x3": [(384, (3, 3))],
        "branch3x3dbl": [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))],
    }
    return _Block(288, branches, halves=True)


def _block_c(c: int) -> _Block:
    """At 17 x 17, with 7 x 7 convolutions as rows and columns; 768 channels."""
    branches: Branches = {
        "branch1x1": [(192, (1, 1))],
        "branch7x7": [(c, (1, 1)), (c, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(c, (1, 1)), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, (1, 1))],
    }
    return _Block(768, branches)


def _block_d() -> _Block:
    """From 17 x 17 to 8 x 8; 1280 channels."""
    branches: Branches = {
        "branch3x3": [(192, (1, 1)), (320, (3, 3))],
        "branch7x7x3": [(192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))],
    }
    return _Block(768, branches, halves=True)


class InceptionE(nn.Module):
    """At 8 x 8, with 3 x 3 convolutions as a row beside a column; 2048 channels."""

    def __init__(self, fan_in: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = _Conv(fan_in, 320)
        self.branch3x3_1 = _Conv(fan_in, 384)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(fan_in, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(fan_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        """(B, `fan_in`, 8, 8) -> (B, 2048, 8, 8)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


class Inception(nn.Module):
    """Inception v3 of 2015-12-05; the module's docstring says how it differs from others."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block_a(192, pooled=32)
        self.Mixed_5c = _block_a(256, pooled=64)
        self.Mixed_5d = _block_a(288, pooled=64)
        self.Mixed_6a = _block_b()
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _block_d()
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(POOLED_CHANNELS, CLASSES, bias=False)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled features (B, 2048), spatial features (B, 2023) and logits (B, 1008).

        Args:
            images_BCHW: images (B, 3, H, W) of any size, with values from 0 to 255.
        """
        x = (resize_bilinear(images_BCHW, IMAGE_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool_halving(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_max_pool_halving(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # In TensorFlow's order, as in ADM's stored statistics: rows, columns, channels.
        spatial_BD = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled_BD = x.mean(dim=(2, 3))
        return pooled_BD, spatial_BD, self.fc(pooled_BD)


def find_inception_weights() -> Path:
    """Find the weights file in the caches of torch.hub and of the Hugging Face Hub.

    Raises:
        UserError: it is in neither.
    """
    for name in WEIGHTS_FILES:
        in_hub = Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{name}")
        for path in (Path(torch.hub.get_dir()) / "checkpoints" / name, *sorted(in_hub)):
            if path.is_file():
                return path
    raise UserError(
        "the Inception weights are not in a cache, and nothing is downloaded: get the file from\n"
        f"{WEIGHTS_URL} and pass --weights FILE"
    )


def load_inception(path: Path, device: torch.device | str = "cpu") -> Inception:
    """Load the network, frozen, from a weights file of pytorch-fid or torch-fidelity.

    Raises:
        UserError: the file does not exist, is damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {WEIGHTS_FILES[0]}")
    in_name = re.search(r"-([0-9a-f]{8,})\.", path.name)  # as torch.hub names files
    if in_name and not (sha256 := storage.hash_file(path)).startswith(in_name[1]):
        raise UserError(
            f"{path}: damaged: its SHA-256 begins with {sha256[:8]}, its name says {in_name[1]}\n"
            f"get it again from {WEIGHTS_URL}"
        )
    network = Inception()
    try:
        stored = storage.load_pt(path)
        if not all(isinstance(value, Tensor) for value in stored.values()):
            raise TypeError("expected tensors only")
        folded = fold_batch_norms(stored)
    except (UserError, KeyError, RuntimeError, AttributeError, TypeError):
        raise UserError(
            f"{path}: not the Inception weights of pytorch-fid and torch-fidelity\n"
            f"get them from {WEIGHTS_URL}"
        ) from None
    load_strict(network, folded, path)
    return to_channels_last(network, torch.device(device)).requires_grad_(False)


def fold_batch_norms(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the batch normalisations of the weights file; the result is a state dict of `Inception`.

    A layer is stored as conv.weight and bn.weight, bias, running_mean, running_var, sometimes with
    bn.num_batches_tracked. The bias of fc is dropped.

    Raises:
        KeyError: a batch normalisation is missing.
        RuntimeError: it does not fit its convolution.
    """
    folded = {}
    for key, value in stored.items():
        name, conv, _ = key.partition(".conv.weight")
        if conv:
            weight, bias = fold_batch_norm(value, stored, f"{name}.bn")
            folded[f"{name}.weight"], folded[f"{name}.bias"] = weight, bias
        elif ".bn." not in key and key != "fc.bias":
            folded[key] = value
    return folded
