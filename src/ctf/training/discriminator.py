"""The discriminator of the tokenizer's training (VQGAN, arXiv 2012.09841).

Shapes: B batch, H, W height and width of images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ctf.common.precision import autocast


class PatchDiscriminator(nn.Module):
    """Rates how real each patch of an image looks (pix2pix, arXiv 1611.07004).

    With group instead of batch normalization, so a rating doesn't depend on the rest of the batch.
    """

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            before, after = width * 2 ** (i - 1), width * 2**i
            stride = 2 if i < layers else 1
            stack += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.GroupNorm(32, after),
                nn.LeakyReLU(0.2),
            ]
        stack.append(nn.Conv2d(width * 2**layers, 1, 4, 1, 1))
        self.layers = nn.Sequential(*stack)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of the patches of images (B, 3, H, W), as (B, 1, H', W')."""
        logits_BCHW: Tensor = self.layers(images_BCHW)
        return logits_BCHW


class DiscriminatorLoss(nn.Module):
    """The hinge loss of a discriminator as one module, as DDP needs it."""

    def __init__(self, discriminator: PatchDiscriminator, *, bf16: bool = False) -> None:
        super().__init__()
        self.discriminator, self.bf16 = discriminator, bf16

    def forward(self, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
        """Return the mean loss over the patches of real and of decoded images."""
        with autocast(real_BCHW.device, self.bf16):
            real, fake = self.discriminator(real_BCHW), self.discriminator(fake_BCHW)
        return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()
