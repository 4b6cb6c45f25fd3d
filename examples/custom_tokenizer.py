"""Plug in a tokenizer of one's own.

The other stages need a tokenizer's codes and code vectors, not a VQ-VAE. Here a code is a patch of
4 x 4 pixels, one of those that k-means found in the training images. Its clusters, the coarse and
the fine model are trained as for any other tokenizer, and `Pipeline` samples from them.

    python examples/custom_tokenizer.py --out custom_tokenizer.png
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional as F

from ctf import Pipeline, open_images
from ctf.data.image_grid import image_grid
from ctf.data.transforms import as_tensor
from ctf.models.clusters import ClustersConfig, fit
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.objectives import Objective, coarse_objective, fine_objective
from ctf.models.transformer import TransformerConfig


@dataclass
class PatchTokenizer:
    """A `ctf.models.tokenizer.Tokenizer`; `fit` creates it from images."""

    codebook_VC: Tensor
    image_size: int
    patch: int = 4

    @classmethod
    def fit(cls, images_BCHW: Tensor, codebook_size: int) -> "PatchTokenizer":
        tokenizer = cls(torch.empty(0), images_BCHW.shape[-1])
        patches_NC = tokenizer.encode_vectors(images_BCHW).flatten(0, 1)
        kmeans = MiniBatchKMeans(codebook_size, random_state=0).fit(patches_NC)
        tokenizer.codebook_VC = torch.from_numpy(kmeans.cluster_centers_).float()
        return tokenizer

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    def codebook(self) -> Tensor:
        return self.codebook_VC

    def encode_vectors(self, images_BCHW: Tensor) -> Tensor:
        return F.unfold(images_BCHW, self.patch, stride=self.patch).transpose(1, 2)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return torch.cdist(self.encode_vectors(images_BCHW), self.codebook_VC).argmin(-1)

    def decode_vectors(self, vectors_BLC: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        return F.fold(vectors_BLC.transpose(1, 2), size, self.patch, stride=self.patch)


def train(
    model: nn.Module, objective: Objective, codes_NL: Tensor, classes_N: Tensor, steps: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(codes_NL), (32,))
        classes_B = classes_N[batch]
        classes_B[torch.rand(32) < 0.1] = model.no_class  # for classifier-free guidance
        loss = objective(model, codes_NL[batch], classes_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{type(model).__name__}: {loss:.2f} nats per token after {steps} steps")
    model.eval().requires_grad_(False)


def main(
    out: Path = Path("custom_tokenizer.png"), steps: int = 1000, images: int = 10_000
) -> Pipeline:
    """Train on Fashion-MNIST, and write a contact sheet of samples.

    Args:
        out: name of the sheet
        steps: of the coarse and the fine model each
        images: number of images to train on
    """
    torch.manual_seed(0)
    data = open_images("fashion-mnist").train
    images_BCHW = as_tensor(data.read(range(images)))
    classes_N = torch.from_numpy(data.classes_N[:images])

    tokenizer = PatchTokenizer.fit(images_BCHW[:1000], codebook_size=256)
    codes_NL = torch.cat([tokenizer.encode(batch) for batch in images_BCHW.split(1000)])
    clusters = fit(tokenizer.codebook(), ClustersConfig(count=32))

    config = TransformerConfig(64, 3, 4, grid=tokenizer.grid, classes=len(data.class_names))
    coarse, fine = CoarseModel(config, clusters.count), FineModel(config, clusters)
    train(coarse, coarse_objective(clusters), codes_NL, classes_N, steps)
    train(fine, fine_objective(clusters), codes_NL, classes_N, steps)

    pipe = Pipeline(tokenizer, clusters, coarse, fine, data.class_names)
    rows = [(name, pipe.sample([name] * 8, seed=0).images) for name in data.class_names]
    image_grid(rows).save(out)
    return pipe


if __name__ == "__main__":
    tyro.cli(main)
