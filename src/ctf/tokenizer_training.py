"""Training and evaluation of the tokenizer: from pictures to a codebook that is used to the full.

The losses of LlamaGen's tokenizer (arXiv 2406.06525, section 2.1): squared error, codebook and
commitment (VQ-VAE, arXiv 1711.00937), and optionally a perceptual loss and a PatchGAN (VQGAN,
arXiv 2012.09841). Codes that are hardly used are moved to where the encoder's vectors are.

Shapes: B batch, C code dimension, H, W height and width, L codes of an image, V codebook size,
N = B * L vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf import checkpoint, config, loop, metrics
from ctf.errors import UserError
from ctf.features import PerceptualLoss
from ctf.images import ImageSet, Splits, View, as_tensor
from ctf.tokenizer import TokenizerConfig, VQModel

EVALUATION_BATCH = 64  # images

M = TypeVar("M", bound=nn.Module)


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


class TokenizerTrainer:
    """A tokenizer, what judges it, and their optimisers: a `loop.Trainable`."""

    def __init__(
        self,
        model_config: TokenizerConfig,
        training: TokenizerTraining,
        images: Splits,
        device: torch.device,
    ) -> None:
        self.training, self.images, self.device = training, images, device
        torch.manual_seed(training.seed)
        self.model = place(VQModel(model_config), device)
        self.optimizer = self._optimizer(self.model)
        self.usage_V = torch.ones(model_config.codebook_size, device=device)
        self.perceptual = place(PerceptualLoss(), device) if training.perceptual_weight else None
        self.discriminator: PatchDiscriminator | None = None
        if training.adversarial_weight:
            self.discriminator = place(PatchDiscriminator(), device)
            self.discriminator_optimizer = self._optimizer(self.discriminator)

    def _optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        t = self.training
        return loop.make_optimizer(module, t.learning_rate, t.betas, t.weight_decay)

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        t, model = self.training, self.model
        rate = loop.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        images_BCHW = self._batch(step)
        vectors_BLC = model.encode_vectors(images_BCHW)
        # Without codes at first: an encoder that knows nothing yet and codes that mean nothing
        # agree on a single point otherwise, and stay there.
        free = step < int(t.free_until * t.steps)
        if free:
            looked_up_BLC = vectors_BLC.detach()
            decoded_BCHW = model.decode_vectors(vectors_BLC)
        else:
            with torch.no_grad():
                codes_N = model.nearest(vectors_BLC.flatten(0, 1))
            looked_up_BLC = model.codebook()[codes_N].view_as(vectors_BLC)
            # Straight through: the decoder's gradient passes the look-up unchanged.
            straight_BLC = vectors_BLC + (looked_up_BLC - vectors_BLC).detach()
            decoded_BCHW = model.decode_vectors(straight_BLC)

        reconstruction = F.mse_loss(decoded_BCHW, images_BCHW)
        # Summed over the code's dimensions: on the unit sphere that is the squared distance.
        codebook = (looked_up_BLC - vectors_BLC.detach()).square().sum(-1).mean()
        commitment = (looked_up_BLC.detach() - vectors_BLC).square().sum(-1).mean()
        loss = reconstruction + t.codebook_weight * codebook + t.commitment_weight * commitment
        logged: dict[str, Tensor | float] = {
            "reconstruction": reconstruction.detach(),
            "commitment": commitment.detach(),
        }
        if self.perceptual is not None:
            perceptual = self.perceptual(decoded_BCHW, images_BCHW).mean()
            loss = loss + t.perceptual_weight * perceptual
            logged["perceptual"] = perceptual.detach()
        judged = self.discriminator is not None and step >= t.adversarial_start * t.steps
        if judged and self.discriminator is not None:
            fooled = -self.discriminator(decoded_BCHW).mean()
            loss = loss + t.adversarial_weight * fooled
            logged["adversarial"] = fooled.detach()

        logged["loss"] = loss.detach()
        logged["gradient_norm"] = loop.update(
            self.optimizer, loss, rate, t.clip, step, "tokenizer's loss"
        )
        if judged and self.discriminator is not None:
            hinge = self._hinge(self.discriminator, images_BCHW, decoded_BCHW.detach())
            loop.update(
                self.discriminator_optimizer, hinge, rate, t.clip, step, "discriminator's loss"
            )
            logged["discriminator"] = hinge.detach()

        logged |= {"learning_rate": rate, "images": t.batch_size}
        if free:
            if step + 1 == int(t.free_until * t.steps):
                self._place_codes(step)
            return logged
        counts_V = torch.bincount(codes_N, minlength=len(self.usage_V))
        fair = len(codes_N) / len(self.usage_V)
        self.usage_V.lerp_(counts_V / fair, min(1.0, 2.0 / t.revive_every))
        if (step + 1) % t.revive_every == 0 and step < t.revive_until * t.steps:
            logged["revived"] = self._revive(vectors_BLC.detach().flatten(0, 1), step)
        return logged

    def _batch(self, step: int) -> Tensor:
        t, train = self.training, self.images.train
        indices = loop.batch_indices(len(train), t.batch_size, t.seed, step)
        if not t.flip:
            return as_tensor(train.read(indices), self.device)
        flip_B = loop.generator(t.seed, 1, step).random(len(indices)) < 0.5
        pixels = np.empty((len(indices), train.image_size, train.image_size, 3), np.uint8)
        for view in (False, True):
            if (flip_B == view).any():
                pixels[flip_B == view] = train.read(indices[flip_B == view], View(flip=view))
        return as_tensor(pixels, self.device)

    @staticmethod
    def _hinge(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()

    @torch.no_grad()
    def _place_codes(self, step: int) -> None:
        """Makes the codebook a random choice of the encoder's vectors of some batches."""
        size = len(self.usage_V)
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < size:
            vectors.append(self.model.encode_vectors(self._batch(len(vectors))).flatten(0, 1))
        vectors_NC = torch.cat(vectors)
        random = loop.generator(self.training.seed, 2, step)
        chosen_V = torch.from_numpy(random.permutation(len(vectors_NC))[:size])
        self.model.embedding.weight.copy_(vectors_NC[chosen_V.to(vectors_NC.device)])

    @torch.no_grad()
    def _revive(self, vectors_NC: Tensor, step: int) -> float:
        """Moves codes that are hardly used to vectors of this batch; returns how many."""
        dead_R = torch.nonzero(self.usage_V < self.training.revive_below).flatten()
        # No more than there are vectors; the least used first.
        dead_R = dead_R[self.usage_V[dead_R].argsort(stable=True)][: len(vectors_NC)]
        random = loop.generator(self.training.seed, 2, step)
        chosen_R = torch.from_numpy(random.permutation(len(vectors_NC))[: len(dead_R)])
        embedding = self.model.embedding.weight
        embedding[dead_R] = vectors_NC[chosen_R.to(vectors_NC.device)]
        for moment in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[embedding][moment][dead_R] = 0.0
        self.usage_V[dead_R] = 1.0
        return float(len(dead_R))

    def evaluate(self) -> Mapping[str, float]:
        return evaluate(self.model, self.images.val, self.device, self.training.evaluate_images)

    def state(self) -> Mapping[str, Tensor]:
        tensors = {
            **loop.prefixed(self.model.state_dict(), "model."),
            **loop.optimizer_state(self.optimizer, "optimizer."),
            "usage_V": self.usage_V,
        }
        if self.discriminator is not None:
            tensors |= loop.prefixed(self.discriminator.state_dict(), "discriminator.")
            tensors |= loop.optimizer_state(self.discriminator_optimizer, "judge_optimizer.")
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        checkpoint.load_strict(self.model, loop.with_prefix(tensors, "model."), "state")
        loop.load_optimizer_state(self.optimizer, tensors, "optimizer.")
        self.usage_V.copy_(tensors["usage_V"])
        if self.discriminator is not None:
            own = loop.with_prefix(tensors, "discriminator.")
            checkpoint.load_strict(self.discriminator, own, "state")
            loop.load_optimizer_state(self.discriminator_optimizer, tensors, "judge_optimizer.")


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


def train(
    model_config: TokenizerConfig,
    training: TokenizerTraining,
    images: Splits,
    folder: Path,
    device: torch.device,
    report: loop.Report | None = None,
) -> VQModel:
    """Trains a tokenizer into `folder`, or goes on where it was killed, or loads it if it is done.

    Writes config.json, metrics.jsonl, model.safetensors.
    """
    loop.claim(
        folder,
        {
            "model": config.to_json(model_config),
            "training": config.to_json(training),
            "images": images.train.fingerprint,
        },
    )
    if not loop.is_finished(folder):
        trainer = TokenizerTrainer(model_config, training, images, device)
        loop.run(
            trainer, folder, training.steps, evaluate_every=training.evaluate_every, report=report
        )
        loop.finish(folder, trainer.model.state_dict(), {})
    return load(folder, device)


def load(folder: Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer in `folder` (config.json, model.safetensors), ready to encode and decode."""
    path = folder / "config.json"
    stored = checkpoint.load_object(path)
    model_config = config.from_json(TokenizerConfig, stored.get("model"), f"{path}: model")
    tensors, _ = checkpoint.load_tensors(folder / "model.safetensors")
    with checkpoint.without_weights():  # the weights come from the file
        model = VQModel(model_config)
    checkpoint.load_strict(
        model, {k: v.float() for k, v in tensors.items()}, folder / "model.safetensors"
    )
    return place(model, torch.device(device)).eval().requires_grad_(False)


@torch.inference_mode()
def evaluate(
    model: VQModel,
    images: ImageSet,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    report: Callable[[int, int], None] | None = None,
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
        if report is not None:
            report(start + len(indices), count)
    return {
        "mse": float(torch.cat(mse).mean()),
        "psnr": float(torch.cat(psnr).mean()),
        "ssim": float(torch.cat(ssim).mean()),
        "usage": metrics.codebook_usage(counts_V),
        "perplexity": metrics.perplexity(counts_V),
        "images": count,
    }


def place(module: M, device: torch.device) -> M:
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
