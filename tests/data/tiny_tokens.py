"""A tokenizer and two sets of noise of 8 x 8 pixels, and folders of their tokens."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ctf.data.extraction import TokensConfig
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import PLAIN, View
from ctf.models.tokenizer import TokenizerConfig, VQModel


class Noise(ImageSet):
    """Images of noise; of a view, only its flip counts."""

    def __init__(self, count: int, seed: int, classes: int = 3) -> None:
        generator = np.random.default_rng(seed)
        self.pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        super().__init__(
            name="noise",
            class_names=tuple(f"class {c}" for c in range(classes)),
            classes_N=np.arange(count, dtype=np.int64) % classes,
            image_size=8,
            fingerprint=f"noise {count} {seed} {classes}",
        )

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        pixels = self.pixels[np.asarray(indices, np.int64)]
        return pixels[:, :, ::-1].copy() if view.flip else pixels


CONFIG = TokensConfig(views="flip", batch_size=4, shard_images=6)
IMAGES = Splits(Noise(20, seed=0), Noise(5, seed=1))
VIEWS_IN_ALL = 2 * 20 + 5  # of IMAGES


def make_tokenizer(codebook_size: int = 64) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        TokenizerConfig(
            image_size=8,
            codebook_size=codebook_size,
            channels=8,
            multipliers=(1, 2),
            blocks=1,
            latent_channels=8,
            groups=4,
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
