"""The whole method from its parts, trained in about a minute on two CPU cores.

Tokenizer, clusters, coarse and fine model come from `ctf.models`. Here they are built, trained on
the included Fashion-MNIST one after another, and sampled from; docs/method.md explains each stage.

    python examples/method.py --out method.png

Shapes: N images, B images of a batch, L codes of an image, C code dimension, V codes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from ctf import open_images
from ctf.data.image_grid import image_grid
from ctf.data.transforms import as_pil, as_tensor
from ctf.models.clusters import ClustersConfig, fit
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import noise_keys
from ctf.models.objectives import Objective, coarse_objective, fine_objective
from ctf.models.parallel import sample_coarse
from ctf.models.sampling import Sampling, sample_fine
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import TransformerConfig

BATCH = 32  # images
TOKENIZER = TokenizerConfig(
    image_size=28, codebook_size=512, channels=16, multipliers=(1, 2, 2), blocks=1,
    latent_channels=32, groups=4,
)  # fmt: skip
TRANSFORMER = TransformerConfig(
    width=96, layers=3, heads=4, grid=TOKENIZER.grid, classes=10, dropout=0.0, ffn_multiple=32
)
CLASS_DROPOUT = 0.1  # share of images without their class, for classifier-free guidance


def train(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], images: int, rate: float, steps: int
) -> None:
    """Minimize the loss of random images; the learning rate falls linearly to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = loss_of(torch.randint(images, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == steps - 1:
            print(f"{type(model).__name__}, step {step + 1} of {steps}: loss {loss:.3f}")
    model.eval().requires_grad_(False)


def train_tokenizer(images_NCHW: Tensor, steps: int) -> VQModel:
    """Squared error, and the two losses of VQ-VAE that draw codes and encoder to each other."""
    tokenizer = VQModel(TOKENIZER)
    usage_V = torch.ones(TOKENIZER.codebook_size)

    def loss_of(rows_B: Tensor) -> Tensor:
        images_BCHW = images_NCHW[rows_B]
        vectors_BLC = tokenizer.encode_vectors(images_BCHW)
        codes_N = tokenizer.nearest(vectors_BLC.detach().flatten(0, 1))
        revive_unused_codes(codes_N, vectors_BLC.detach().flatten(0, 1))
        quantized_BLC = tokenizer.codebook()[codes_N].view_as(vectors_BLC)
        # Forwards the code vectors; backwards as if nothing had been quantized.
        straight_BLC = vectors_BLC + (quantized_BLC - vectors_BLC).detach()
        error = F.mse_loss(tokenizer.decode_vectors(straight_BLC), images_BCHW)
        codebook = (quantized_BLC - vectors_BLC.detach()).square().sum(-1).mean()
        commitment = (quantized_BLC.detach() - vectors_BLC).square().sum(-1).mean()
        return error + codebook + 0.25 * commitment

    def revive_unused_codes(codes_N: Tensor, vectors_NC: Tensor) -> None:
        """Move codes that are hardly used to random vectors of the batch."""
        usage_V.mul_(0.95).index_add_(0, codes_N, torch.ones(len(codes_N)))
        unused_R = (usage_V < 0.05 * usage_V.mean()).nonzero()[:, 0]
        random_R = torch.randint(len(vectors_NC), unused_R.shape)
        tokenizer.embedding.weight.data[unused_R] = vectors_NC[random_R]
        usage_V[unused_R] = usage_V.mean()

    train(tokenizer, loss_of, len(images_NCHW), 2e-3, steps)
    return tokenizer


def train_on_codes(
    model: CoarseModel | FineModel,
    objective: Objective,
    codes_NL: Tensor,
    classes_N: Tensor,
    steps: int,
) -> None:
    """The objective on codes and classes, now and then without the class."""

    def loss_of(rows_B: Tensor) -> Tensor:
        hidden_B = torch.rand(BATCH) < CLASS_DROPOUT
        classes_B = classes_N[rows_B].masked_fill(hidden_B, model.no_class)
        return objective(model, codes_NL[rows_B], classes_B)

    train(model, loss_of, len(codes_NL), 4e-3, steps)


def main(
    out: Path = Path("method.png"), steps: int = 300, images: int = 5000, seed: int = 0
) -> None:
    """Train all models on Fashion-MNIST, and write a sheet of samples.

    Args:
        out: file of the sheet
        steps: of each of the three trainings
        images: number of images to train on
        seed: of weights, batches and samples
    """
    torch.manual_seed(seed)
    data = open_images("fashion-mnist", TOKENIZER.image_size).train
    images_NCHW = as_tensor(data.read(range(images)))
    classes_N = torch.from_numpy(data.classes_N[:images])

    # 1. The tokenizer: images <-> 7 x 7 codes out of a codebook of 512.
    tokenizer = train_tokenizer(images_NCHW, steps)
    # 2. Tokens: all images as codes.
    codes_NL = torch.cat([tokenizer.encode(part) for part in images_NCHW.split(500)])
    # 3. Clusters of similar codes: a code's cluster is its coarse label.
    clusters = fit(tokenizer.codebook(), ClustersConfig(count=64))
    # 4. The coarse model: class and labels so far -> next label.
    coarse = CoarseModel(TRANSFORMER, clusters.count)
    train_on_codes(coarse, coarse_objective(clusters), codes_NL, classes_N, steps)
    # 5. The fine model: class and all labels -> all codes.
    fine = FineModel(TRANSFORMER, clusters)
    train_on_codes(fine, fine_objective(clusters), codes_NL, classes_N, steps)

    # 6. Sampling: labels one after another, then all codes in one pass, then the decoder.
    classes_B = torch.arange(10).repeat_interleave(8)
    keys_B2L = noise_keys(range(seed, seed + len(classes_B)), TRANSFORMER.length)
    settings = Sampling(guidance=2.0)
    labels_BL = sample_coarse(coarse, classes_B, keys_B2L[:, 0], settings)
    codes_BL = sample_fine(fine, clusters, labels_BL, classes_B, keys_B2L[:, 1], settings)
    samples = as_pil(tokenizer.decode(codes_BL))
    rows = [(name, samples[8 * i : 8 * i + 8]) for i, name in enumerate(data.class_names)]
    image_grid(rows).save(out)


if __name__ == "__main__":
    tyro.cli(main)
