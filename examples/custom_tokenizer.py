"""Plug in a tokenizer of your own.

The other stages need a tokenizer's codes and code vectors, not a VQ-VAE. Here a code is a patch of
4 x 4 pixels, one of those that k-means finds in the training images. Its clusters, the coarse and
the fine model are trained as for any other tokenizer, and `Pipeline` samples from them.

    python examples/custom_tokenizer.py --out custom_tokenizer.png
"""

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

PATCH = 4  # pixels per side


class PatchTokenizer:
    """A `ctf.models.tokenizer.Tokenizer`."""

    def __init__(self, images_BCHW: Tensor, codebook_size: int) -> None:
        self.image_size = images_BCHW.shape[-1]
        self.grid = self.image_size // PATCH
        kmeans = MiniBatchKMeans(codebook_size, random_state=0)
        kmeans.fit(patches(images_BCHW).flatten(0, 1))
        self.codebook_VC = torch.from_numpy(kmeans.cluster_centers_).float()

    def codebook(self) -> Tensor:
        return self.codebook_VC

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return torch.cdist(patches(images_BCHW), self.codebook_VC).argmin(-1)

    def decode_vectors(self, vectors_BLC: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        return F.fold(vectors_BLC.transpose(1, 2), size, PATCH, stride=PATCH)


def patches(images_BCHW: Tensor) -> Tensor:
    """Return the patches of images as vectors (B, L, C), row by row."""
    return F.unfold(images_BCHW, PATCH, stride=PATCH).transpose(1, 2)


def train(model: nn.Module, objective: Objective, codes_NL: Tensor, classes_N: Tensor, steps: int):
    """Train a model with AdamW, without a class for one image in ten (for guidance)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(codes_NL), (32,))
        classes_B = classes_N[batch].masked_fill(torch.rand(32) < 0.1, model.no_class)
        loss = objective(model, codes_NL[batch], classes_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{type(model).__name__}: {loss:.2f} nats per token after {steps} steps")
    model.eval().requires_grad_(False)


def main(out: Path = Path("custom_tokenizer.png"), steps: int = 1000, images: int = 10_000):
    """Train on images of Fashion-MNIST, `steps` steps each model; write samples into `out`."""
    torch.manual_seed(0)
    data = open_images("fashion-mnist").train
    images_BCHW = as_tensor(data.read(range(images)))
    classes_N = torch.from_numpy(data.classes_N[:images])

    tokenizer = PatchTokenizer(images_BCHW[:1000], codebook_size=256)
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
