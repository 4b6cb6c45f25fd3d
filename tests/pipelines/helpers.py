"""What the tests of pipelines share."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctf.pipelines.generation import Samples

GRID, LENGTH = 4, 16  # tokens of an image of the test run
CLASSES, SEED = [0, 1, 2, 1], 7
PARTS = (
    "pipeline.json", "clusters/clusters.safetensors", "tokenizer/config.json",
    "tokenizer/model.safetensors", "coarse/config.json", "coarse/model.safetensors",
    "fine/config.json", "fine/model.safetensors",
)  # fmt: skip
DRAFTS = "coarse/drafts.safetensors"  # which a pipeline need not have

# Codes of no image, and masks.
CODES_BL = torch.arange(len(CLASSES) * LENGTH).view(-1, LENGTH) * 5 % 64
UPPER_L = torch.arange(LENGTH) < LENGTH // 2
ALL_L = torch.ones(LENGTH, dtype=torch.bool)


def as_mask(bits: int) -> Tensor:
    """A mask for each of the CLASSES, from the bits of a number."""
    count = len(CLASSES) * LENGTH
    return torch.tensor([bool(bits >> i & 1) for i in range(count)]).view(-1, LENGTH)


MASK_BL = as_mask(0xF0F0_1234_0000_FFFF)


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def same_codes(one: Samples, other: Samples) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.coarse, other.coarse)


def same(one: Samples, other: Samples) -> bool:
    return same_codes(one, other) and bool((pixels(one.images) == pixels(other.images)).all())


def same_up_to_rounding(one: Samples, other: Samples) -> bool:
    """As after other kernels, or the same ones at other positions of a batch."""
    distance = np.abs(pixels(one.images).astype(int) - pixels(other.images))
    return same_codes(one, other) and int(distance.max()) <= 1
