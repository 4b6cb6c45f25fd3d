"""Training and evaluation of the tokenizer: from pictures to a codebook that is used to the full.

The losses of LlamaGen's tokenizer (arXiv 2406.06525, section 2.1): squared error, codebook and
commitment (VQ-VAE, arXiv 1711.00937), and optionally a perceptual loss and a PatchGAN (VQGAN,
arXiv 2012.09841). Codes that are hardly used are moved to where the encoder's vectors are.

Shapes: B batch, C code dimension, H, W height and width, L codes of an image, V codebook size,
N = B * L vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.common import config, rng
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import View, as_tensor
from ctf.evaluation import metrics
from ctf.evaluation.features import PerceptualLoss
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines.folder import load_tokenizer, to_channels_last
from ctf.training import loop
from ctf.training.state import Part, collect, restore

EVALUATION_BATCH = 64  # images


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """How a tokenizer is trained."""

    steps: int = 20_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02  # of the peak
    warm_up: int = 100  # steps
    schedule: loop.Schedule = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    flip: bool = True  # a mirrored picture is as good a picture to the tokenizer
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    perceptual_weight: float = 0.0
    free_until: float = 0.1  # of the steps; before, decoding is from the vectors, not the codes
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.5  # of the steps; a discriminator is of no use before
    revive_every: int = 25  # steps
    revive_below: float = 0.1  # of a code's fair share of the look-ups
    revive_until: float = 0.7  # of the steps; then the codes settle
    evaluate_every: int = 1000  # steps
    evaluate_images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        loop.check(self)
        if self.revive_every < 1:
            raise UserError(f"revive_every: got {self.revive_every}, expected 1 or more")


class Reconstruction(nn.Module):
    """A tokenizer's pass through pictures as one module, as DDP expects it."""

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor, free: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The encoder's vectors (B, L, C), what was looked up for them, codes (N,), and images.

        Args:
            free: decode from the vectors themselves; no code is looked up.
        """
        model = self.model
        vectors_BLC = model.encode_vectors(images_BCHW)
        if free:
            looked_up_BLC = vectors_BLC.detach()
            codes_N = torch.empty(0, dtype=torch.int64, device=vectors_BLC.device)
            return vectors_BLC, looked_up_BLC, codes_N, model.decode_vectors(vectors_BLC)
        with torch.no_grad():
            codes_N = model.nearest(vectors_BLC.flatten(0, 1))
        looked_up_BLC = model.codebook()[codes_N].view_as(vectors_BLC)
        # Straight through: the decoder's gradient passes the look-up unchanged.
        straight_BLC = vectors_BLC + (looked_up_BLC - vectors_BLC).detach()
        return vectors_BLC, looked_up_BLC, codes_N, model.decode_vectors(straight_BLC)


class TokenizerTrainer:
    """A tokenizer, what judges it, and their optimisers: a `loop.Trainable`.

    Every process of the world trains on its share of each batch and ends with the same weights.

    Raises:
        UserError: the batch cannot be shared equally among the processes.
    """

    def __init__(
        self,
        model_config: TokenizerConfig,
        training: TokenizerTraining,
        images: Splits,
        world: World,
    ) -> None:
        self.training, self.images, self.world = training, images, world
        self.share = world.share(training.batch_size, "batch_size")
        device = world.device
        torch.manual_seed(training.seed)
        self.model = to_channels_last(VQModel(model_config), device)
        self.shared = world.wrap(Reconstruction(self.model), unused=True)
        self.optimizer = self._optimizer(self.model)
        self.usage_V = torch.ones(model_config.codebook_size, device=device)
        self.perceptual = (
            to_channels_last(PerceptualLoss(), device) if training.perceptual_weight else None
        )
        self.discriminator: PatchDiscriminator | None = None
        if training.adversarial_weight:
            self.discriminator = to_channels_last(PatchDiscriminator(), device)
            self.hinge = world.wrap(Hinge(self.discriminator))
            self.discriminator_optimizer = self._optimizer(self.discriminator)

    def _optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        t = self.training
        return loop.make_optimizer(module, t.learning_rate, t.betas, t.weight_decay)

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        t = self.training
        rate = loop.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        pictures_B, images_BCHW = self._batch(step)
        # Without codes at first: an encoder that knows nothing yet and codes that mean nothing
        # agree on a single point otherwise, and stay there.
        free = step < int(t.free_until * t.steps)
        vectors_BLC, looked_up_BLC, codes_N, decoded_BCHW = self.shared(images_BCHW, free)

        reconstruction = F.mse_loss(decoded_BCHW, images_BCHW)
        # Summed over the code's dimensions: on the unit sphere that is the squared distance.
        codebook = (looked_up_BLC - vectors_BLC.detach()).square().sum(-1).mean()
        commitment = (looked_up_BLC.detach() - vectors_BLC).square().sum(-1).mean()
        loss = reconstruction + t.codebook_weight * codebook + t.commitment_weight * commitment
        logged = {"reconstruction": reconstruction.detach(), "commitment": commitment.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual(decoded_BCHW, images_BCHW).mean()
            loss = loss + t.perceptual_weight * perceptual
            logged["perceptual"] = perceptual.detach()
        judged = self.discriminator is not None and step >= t.adversarial_start * t.steps
        if judged and self.discriminator is not None:
            # It judges only: its own gradients come from the hinge loss below.
            self.discriminator.requires_grad_(False)
            fooled = -self.discriminator(decoded_BCHW).mean()
            self.discriminator.requires_grad_(True)
            loss = loss + t.adversarial_weight * fooled
            logged["adversarial"] = fooled.detach()

        logged["loss"] = loss.detach()
        logged = {name: self.world.mean(value) for name, value in logged.items()}

        def update(
            optimizer: torch.optim.Optimizer, loss: Tensor, mean: Tensor, what: str
        ) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            return loop.update(optimizer, mean, rate, t.clip, step, what, pictures_B, self.world)

        said: dict[str, Tensor | float] = {**logged}
        said["gradient_norm"] = update(self.optimizer, loss, logged["loss"], "tokenizer's loss")
        if judged:
            hinge = self.hinge(images_BCHW, decoded_BCHW.detach())
            said["discriminator"] = mean = self.world.mean(hinge.detach())
            update(self.discriminator_optimizer, hinge, mean, "discriminator's loss")

        said |= {"learning_rate": rate, "images": t.batch_size}
        if free:
            if step + 1 == int(t.free_until * t.steps):
                self._place_codes(step)
            return said
        counts_V = self.world.sum(torch.bincount(codes_N, minlength=len(self.usage_V)))
        fair = len(codes_N) * self.world.size / len(self.usage_V)
        self.usage_V.lerp_(counts_V / fair, min(1.0, 2.0 / t.revive_every))
        if (step + 1) % t.revive_every == 0 and step < t.revive_until * t.steps:
            vectors_NC = self.world.gather(vectors_BLC.detach().flatten(0, 1))
            said["revived"] = self._revive(vectors_NC, step)
        return said

    def _batch(self, step: int) -> tuple[np.ndarray, Tensor]:
        """The pictures of a batch, the same for any number of processes, and the pixels of this
        process's share."""
        t, train = self.training, self.images.train
        indices_B = loop.batch_indices(len(train), t.batch_size, t.seed, step)
        flip_B = rng.generator(t.seed, 1, step).random(t.batch_size) < (0.5 if t.flip else 0.0)
        mine_B, flip_B = indices_B[self.share], flip_B[self.share]
        pixels = np.empty((len(mine_B), train.image_size, train.image_size, 3), np.uint8)
        for view in (False, True):
            if (flip_B == view).any():
                pixels[flip_B == view] = train.read(mine_B[flip_B == view], View(flip=view))
        return indices_B, as_tensor(pixels, self.world.device)

    @torch.no_grad()
    def _place_codes(self, step: int) -> None:
        """Makes the codebook a random choice of the encoder's vectors of some batches."""
        size = len(self.usage_V)
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < size:
            _, images_BCHW = self._batch(len(vectors))
            vectors_NC = self.model.encode_vectors(images_BCHW).flatten(0, 1)
            vectors.append(self.world.gather(vectors_NC))
        vectors_NC = torch.cat(vectors)
        random = rng.generator(self.training.seed, 2, step)
        chosen_V = torch.from_numpy(random.permutation(len(vectors_NC))[:size])
        self.model.embedding.weight.copy_(vectors_NC[chosen_V.to(vectors_NC.device)])

    @torch.no_grad()
    def _revive(self, vectors_NC: Tensor, step: int) -> float:
        """Moves codes that are hardly used to vectors of this batch; returns how many."""
        dead_R = torch.nonzero(self.usage_V < self.training.revive_below).flatten()
        # No more than there are vectors; the least used first.
        dead_R = dead_R[self.usage_V[dead_R].argsort(stable=True)][: len(vectors_NC)]
        random = rng.generator(self.training.seed, 2, step)
        chosen_R = torch.from_numpy(random.permutation(len(vectors_NC))[: len(dead_R)])
        embedding = self.model.embedding.weight
        embedding[dead_R] = vectors_NC[chosen_R.to(vectors_NC.device)]
        for moment in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[embedding][moment][dead_R] = 0.0
        self.usage_V[dead_R] = 1.0
        return float(len(dead_R))

    def evaluate(self) -> Mapping[str, float]:
        if not self.world.is_main:
            return {}  # of which nothing would be written
        limit = self.training.evaluate_images
        return evaluate(self.model, self.images.val, self.world.device, limit)

    def state(self) -> Mapping[str, Tensor]:
        return {**collect(**self._parts()), "usage_V": self.usage_V}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        restore(tensors, **self._parts())
        self.usage_V.copy_(tensors["usage_V"])

    def _parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {"model": self.model, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator
            parts["judge_optimizer"] = self.discriminator_optimizer
        return parts


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> how real each patch looks, (B, 1, H', W') (pix2pix, arXiv 1611.07004).

    Group instead of batch normalisation: a picture is judged alike in any batch.
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
        return self.layers(images_BCHW)


class Hinge(nn.Module):
    """The loss of a discriminator that is shown real pictures and made ones."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
        real, fake = self.discriminator(real_BCHW), self.discriminator(fake_BCHW)
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def train(
    model_config: TokenizerConfig,
    training: TokenizerTraining,
    images: Splits,
    folder: Path,
    world: World = ALONE,
    progress: Progress | None = None,
) -> VQModel:
    """Trains a tokenizer into `folder`, or goes on where it was killed, or loads it if it is done.

    Writes config.json, metrics.jsonl, model.safetensors.
    """
    description = {
        "model": config.to_json(model_config),
        "training": config.to_json(training),
        "images": images.train.fingerprint,
    }
    if loop.begin(folder, description, world):
        trainer = TokenizerTrainer(model_config, training, images, world)
        loop.run(
            trainer,
            folder,
            training.steps,
            evaluate_every=training.evaluate_every,
            progress=progress,
            world=world,
        )
        loop.finish(folder, trainer.model.state_dict(), {}, world)
    return load_tokenizer(folder, world.device)


@torch.inference_mode()
def evaluate(
    model: VQModel,
    images: ImageSet,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Reconstruction of (the first `limit` of) a set's pictures, and how the codebook is used.

    Returns:
        mse (on [-1, 1]), psnr (dB), ssim, usage (fraction of the codebook seen), perplexity (in
        codes), images (how many were looked at).
    """
    count = min(len(images), limit or len(images))
    psnr, ssim, mse = [], [], []
    counts_V = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for start in range(0, count, EVALUATION_BATCH):
        indices = np.arange(start, min(start + EVALUATION_BATCH, count))
        images_BCHW = as_tensor(images.read(indices), torch.device(device))
        codes_BL = model.encode(images_BCHW)
        decoded_BCHW = model.decode(codes_BL)
        mse.append((decoded_BCHW - images_BCHW).square().mean((1, 2, 3)).cpu())
        psnr.append(metrics.psnr(decoded_BCHW, images_BCHW).cpu())
        ssim.append(metrics.ssim(decoded_BCHW, images_BCHW).cpu())
        counts_V += torch.bincount(codes_BL.flatten().cpu(), minlength=len(counts_V))
        if progress is not None:
            progress(start + len(indices), count)
    return {
        "mse": float(torch.cat(mse).mean()),
        "psnr": float(torch.cat(psnr).mean()),
        "ssim": float(torch.cat(ssim).mean()),
        "usage": metrics.codebook_usage(counts_V),
        "perplexity": metrics.perplexity(counts_V),
        "images": count,
    }
