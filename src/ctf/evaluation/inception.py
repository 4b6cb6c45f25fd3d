"""The Inception network by which FID, sFID and the Inception Score are defined.

It is the frozen TensorFlow graph of 2015-12-05 (`classify_image_graph_def.pb`), which ADM's
evaluator (openai/guided-diffusion, evaluations/evaluator.py) runs, and which pytorch-fid and
torch-fidelity converted to PyTorch. The convolutions are those of "Rethinking the Inception
Architecture for Computer Vision" (arXiv 1512.00567). What the graph has of its own, and any
other Inception v3 has not:

- Pictures of any size are squeezed or stretched to 299 x 299 by TensorFlow 1's bilinear filter,
  whose pixels lie on the grid points, not between them; then (x - 128) / 128.
- Average pooling leaves the border of padding out of its averages (pytorch-fid: FIDInceptionA, C
  and E_1).
- The last block pools by the maximum instead (pytorch-fid: FIDInceptionE_2).
- 1008 outputs; ADM and torch-fidelity ("logits_unbiased") leave their bias out.
- `mixed_6/conv:0`, from which sFID is made, is the first branch of `Mixed_6d`, by the names in
  torch-fidelity's util_convert_inception_weights.py. In the graph a convolution `name` is the nodes
  name/Conv2D, name/batchnorm and name, so it is what comes out of the rectifier. The block's maps
  begin with those of its first branch.

The names of the layers are those of the weights file of pytorch-fid and torch-fidelity.

Shapes: B images, C channels, H height, W width, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.evaluation.features import fold_batch_norm

SIZE = 299
CHANNELS = 2048  # of the pooled features, the graph's pool_3
SPATIAL_CHANNELS = 7  # of mixed_6/conv, at 17 x 17 places: 2023 features, about as many as 2048
CLASSES = 1008


def resize_bilinear(images_BCHW: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear` without aligned corners: (B, C, size, size), float32.

    Pixel i is taken at i * H / size of the picture, without the half pixel that other
    implementations add, and without smoothing where the picture gets smaller. The order of the
    operations is TensorFlow's too (core/kernels/resize_bilinear_op.cc): columns, then rows.
    """
    x = images_BCHW.float()
    for dim in (3, 2):
        length = x.shape[dim]
        # In single precision, as there.
        at = torch.arange(size, device=x.device) * torch.tensor(length / size, dtype=torch.float32)
        low = at.long()
        high = (low + 1).clamp(max=length - 1)
        fraction = (at - low).view(-1, *[1] * (3 - dim))
        lower, upper = x.index_select(dim, low), x.index_select(dim, high)
        x = lower + (upper - lower) * fraction
    return x


class _Conv(nn.Conv2d):
    """A convolution with its batch normalisation folded in, then a rectifier.

    At stride 1 the size stays; at stride 2, or where it is not `padded`, nothing is added.
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


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class _BlockA(nn.Module):
    """At 35 x 35: 1x1, 5x5, twice 3x3, and an average; 224 channels and those of the last."""

    def __init__(self, fan_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(fan_in, 64)
        self.branch5x5_1 = _Conv(fan_in, 48)
        self.branch5x5_2 = _Conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = _Conv(fan_in, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3))
        self.branch_pool = _Conv(fan_in, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class _BlockB(nn.Module):
    """From 35 x 35 to 17 x 17: 3x3, twice 3x3, and the maximum; 768 channels."""

    def __init__(self, fan_in: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(fan_in, 384, (3, 3), stride=2)
        self.branch3x3dbl_1 = _Conv(fan_in, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _shrink(x)], dim=1)


class _BlockC(nn.Module):
    """At 17 x 17: 1x1, a 7x7 and two of them as rows and columns, and an average; 768 channels."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192)
        self.branch7x7_1 = _Conv(768, inner)
        self.branch7x7_2 = _Conv(inner, inner, (1, 7))
        self.branch7x7_3 = _Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1 = _Conv(768, inner)
        self.branch7x7dbl_2 = _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3 = _Conv(inner, inner, (1, 7))
        self.branch7x7dbl_4 = _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Conv(inner, 192, (1, 7))
        self.branch_pool = _Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], dim=1)


class _BlockD(nn.Module):
    """From 17 x 17 to 8 x 8: 3x3, 7x7 and 3x3, and the maximum; 1280 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192)
        self.branch3x3_2 = _Conv(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1 = _Conv(768, 192)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), _shrink(x)], dim=1)


class _BlockE(nn.Module):
    """At 8 x 8: 1x1, a row beside a column, 3x3 and the same again, and a pool; 2048 channels."""

    def __init__(self, fan_in: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
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
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
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
    """Inception v3 of 2015-12-05; see the module's text for what is peculiar to it."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _BlockA(192, pooled=32)
        self.Mixed_5c = _BlockA(256, pooled=64)
        self.Mixed_5d = _BlockA(288, pooled=64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b = _BlockE(1280, maximum=False)
        self.Mixed_7c = _BlockE(2048, maximum=True)
        self.fc = nn.Linear(CHANNELS, CLASSES, bias=False)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features (B, 2048), spatial features (B, 2023) and logits (B, 1008).

        Args: images (B, 3, H, W) of any size, with values of 0 to 255 as in 8-bit pictures.
        """
        x = (resize_bilinear(images_BCHW, SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_shrink(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_shrink(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # In TensorFlow's order, so that ADM's stored statistics fit: rows, columns, channels.
        spatial_BD = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled_BD = x.mean(dim=(2, 3))
        return pooled_BD, spatial_BD, self.fc(pooled_BD)


def fold_batch_norms(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the weights file as `Inception` has them, normalisations folded in.

    A layer's tensors are stored as conv.weight and bn.weight, bias, running_mean, running_var; some
    writers add bn.num_batches_tracked. The bias of fc is not used.

    Raises:
        KeyError: a normalisation is missing. RuntimeError: it does not fit its convolution.
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
