"""Training of the tokenizer.

The losses are those of LlamaGen's tokenizer (arXiv 2406.06525, section 2.1): squared error,
codebook and commitment loss (VQ-VAE, arXiv 1711.00937), and optionally a perceptual loss and a
PatchGAN discriminator (VQGAN, arXiv 2012.09841). Codes that are hardly used are moved to vectors of
the encoder.

Shapes: B batch, C code dimension, H, W height and width, L codes of an image, V codebook size,
R revived codes, N = B * L vectors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf import kernels
from ctf.common import config, rng, storage, threads
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError
from ctf.common.precision import autocast, uses_bf16
from ctf.common.progress import Progress
from ctf.common.weights import load_strict
from ctf.data.image_set import Splits
from ctf.data.transforms import View, from_pixels
from ctf.evaluation.lite0 import PerceptualLoss
from ctf.evaluation.reconstruction import reconstruction_metrics
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines.folder import load_tokenizer, to_channels_last
from ctf.training import loop, muon, optim
from ctf.training.batches import Batch, Batches, to_device
from ctf.training.discriminator import DiscriminatorLoss, PatchDiscriminator
from ctf.training.state import Part


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """How a tokenizer is trained."""

    steps: int = 20_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02  # of the peak
    warm_up: int = 100  # steps
    schedule: optim.Schedule = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    flip: bool = True  # mirror half of the images; to a tokenizer they are as good
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    perceptual_weight: float = 0.0
    free_until: float = 0.1  # of the steps; before, the vectors are decoded without quantization
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.5  # of the steps; the discriminator is trained from then on
    revive_every: int = 25  # steps
    revive_below: float = 0.1  # of the usage that a code has if all are used equally
    revive_until: float = 0.7  # of the steps; then the codes settle
    evaluate_every: int = 1000  # steps
    evaluate_images: int = 1000
    seed: int = 0
    # None is AdamW, as in recipes of before there was a choice.
    optimizer: optim.Optimizer | None = dataclasses.field(
        default=None, metadata=config.OMIT_DEFAULT
    )

    def __post_init__(self) -> None:
        optim.check_training(self)
        if self.revive_every < 1:
            raise UserError(f"revive_every: got {self.revive_every}, expected 1 or more")


class Reconstruction(nn.Module):
    """A tokenizer's forward pass in training as one module, as DDP needs it.

    With `bf16`, encoder and decoder compute in bfloat16, under autocast; codes are looked up in
    float32, in which images and vectors are returned.
    """

    def __init__(self, model: VQModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, images_BCHW: Tensor, quantize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode, quantize and decode images.

        Returns:
            The encoder's vectors (B, L, C), their codebook vectors (B, L, C), their codes (N,),
            and the decoded images (B, 3, H, W). Without quantization, the encoder's vectors are
            decoded: there are no codes, and the codebook vectors are the encoder's.
        """
        model = self.model
        with autocast(images_BCHW.device, self.bf16):
            vectors_BLC = model.encode_vectors(images_BCHW).float()
        if not quantize:
            codes_N = torch.empty(0, dtype=torch.int64, device=vectors_BLC.device)
            return vectors_BLC, vectors_BLC.detach(), codes_N, self._decode(vectors_BLC)
        with torch.no_grad():
            codes_N = model.nearest(vectors_BLC.flatten(0, 1))
        quantized_BLC = model.codebook()[codes_N].view_as(vectors_BLC)
        # Straight through: the decoder's gradient passes the quantization unchanged.
        straight_BLC = vectors_BLC + (quantized_BLC - vectors_BLC).detach()
        return vectors_BLC, quantized_BLC, codes_N, self._decode(straight_BLC)

    def _decode(self, vectors_BLC: Tensor) -> Tensor:
        with autocast(vectors_BLC.device, self.bf16):
            return self.model.decode_vectors(vectors_BLC).float()


class TokenizerTrainer:
    """A tokenizer, its optional discriminator and their optimizers: a `loop.Trainable`.

    Every process of the world trains on its share of each batch and ends with the same weights.

    Raises:
        UserError: The batch size is no multiple of the number of processes.
    """

    def __init__(
        self,
        model_config: TokenizerConfig,
        training: TokenizerTraining,
        images: Splits,
        world: World,
        execution: loop.Execution = loop.DEFAULT_EXECUTION,
        warm_start: Path | None = None,
    ) -> None:
        self.training, self.images, self.world = training, images, world
        self.in_bf16 = uses_bf16(execution.precision, world.device)
        self.share = world.share(training.batch_size, "batch_size")
        self.in_parts = threads.pays(world.device, world.size) and not execution.compile
        # At first without codes: an encoder that has learned nothing and codes that mean nothing
        # collapse to a single code, and stay there.
        self.quantized_from = int(training.free_until * training.steps)
        device = world.device
        torch.manual_seed(training.seed)
        model = VQModel(model_config)
        if warm_start is not None:
            load_strict(model, load_tokenizer(warm_start).state_dict(), warm_start)
        self.model = to_channels_last(model, device)
        kernels.for_training(self.model, compile=execution.compile)
        reconstruction = Reconstruction(self.model, bf16=self.in_bf16)
        self.reconstruction = world.wrap(reconstruction, unused=True)
        self.optimizer = self._make_optimizer(self.model, *self.model.blocks())
        self.batches = Batches(self.read_batch, training.steps, device)
        self.checks = optim.Checks(world)
        self.usage_V = torch.ones(model_config.codebook_size, device=device)
        self.perceptual = (
            to_channels_last(PerceptualLoss(), device) if training.perceptual_weight else None
        )
        self.discriminator: PatchDiscriminator | None = None
        if training.adversarial_weight:
            self.discriminator = to_channels_last(PatchDiscriminator(), device)
            loss = DiscriminatorLoss(self.discriminator, bf16=self.in_bf16)
            self.discriminator_loss = world.wrap(loss)
            self.discriminator_optimizer = self._make_optimizer(self.discriminator)

    def _make_optimizer(self, module: nn.Module, *blocks: nn.Module) -> torch.optim.AdamW:
        t = self.training
        hidden = muon.hidden_weights(*blocks) if t.optimizer == "muon" else {}
        return optim.make_optimizer(module, t.learning_rate, t.betas, t.weight_decay, hidden)

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take a step of the tokenizer and, from its start on, of the discriminator."""
        t = self.training
        rate = optim.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        indices_B, (pixels_BHWC,) = self.batches(step)
        images_BCHW = from_pixels(pixels_BHWC)

        def update(
            optimizer: torch.optim.Optimizer,
            compute: Callable[..., optim.Computed],
            batch: Sequence[Tensor],
            name: str,
        ) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
            optimizer.zero_grad(set_to_none=True)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            means, tensors = optim.backward(compute, batch, parameters)
            means = {name: self.world.mean(value) for name, value in means.items()}
            norm = optim.update(
                optimizer, means["loss"], rate, t.clip,
                step=step, name=name, images_B=indices_B, checks=self.checks,
            )  # fmt: skip
            return means, tensors, norm

        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # its gradients come from its own loss
        losses, (vectors_BLC, codes_N, decoded_BCHW), norm = update(
            self.optimizer,
            functools.partial(self._losses, step),
            [images_BCHW],
            "tokenizer's loss",
        )
        logged: dict[str, Tensor | float] = {**losses, "gradient_norm": norm}
        if self.discriminator is not None and self._is_adversarial(step):
            self.discriminator.requires_grad_(True)
            means, *_ = update(
                self.discriminator_optimizer,
                lambda *images: ({"loss": self.discriminator_loss(*images)}, []),
                [images_BCHW, decoded_BCHW],
                "discriminator's loss",
            )
            logged["discriminator"] = means["loss"]
        logged |= {"learning_rate": rate, "images": t.batch_size}

        if step >= self.quantized_from:
            self._update_usage(codes_N)
            if (step + 1) % t.revive_every == 0 and step < t.revive_until * t.steps:
                vectors_NC = self.world.gather(vectors_BLC.flatten(0, 1))
                logged["revived"] = self._revive(vectors_NC, step)
        elif step + 1 == self.quantized_from:
            self._init_codebook(step)
        return logged

    def _is_adversarial(self, step: int) -> bool:
        t = self.training
        return self.discriminator is not None and step >= t.adversarial_start * t.steps

    def check(self) -> None:
        """Raise a UserError if a loss or gradient of a step since was not finite."""
        self.checks.check()

    def read_batch(self, step: int) -> Batch:
        """Return the indices of the whole batch and the pixels of this process's share."""
        t, train = self.training, self.images.train
        indices_B = optim.batch_indices(len(train), t.batch_size, t.seed, step)
        flip_B = rng.generator(t.seed, 1, step).random(t.batch_size) < (0.5 if t.flip else 0.0)
        share_B, flip_B = indices_B[self.share], flip_B[self.share]
        pixels_BHWC = np.empty((len(share_B), train.image_size, train.image_size, 3), np.uint8)
        for flip in (False, True):
            if (flip_B == flip).any():
                pixels_BHWC[flip_B == flip] = train.read(share_B[flip_B == flip], View(flip=flip))
        return indices_B, [torch.from_numpy(pixels_BHWC)]

    def _losses(self, step: int, images_BCHW: Tensor) -> optim.Computed:
        """Return the tokenizer's loss and its terms; vectors, codes and decoded images."""
        t = self.training
        vectors_BLC, quantized_BLC, codes_N, decoded_BCHW = self.reconstruction(
            images_BCHW, step >= self.quantized_from
        )
        reconstruction = F.mse_loss(decoded_BCHW, images_BCHW)
        # Summed over the code's dimensions: on the unit sphere that is the squared distance.
        codebook = (quantized_BLC - vectors_BLC.detach()).square().sum(-1).mean()
        commitment = (quantized_BLC.detach() - vectors_BLC).square().sum(-1).mean()
        loss = reconstruction + t.codebook_weight * codebook + t.commitment_weight * commitment
        losses = {"reconstruction": reconstruction, "commitment": commitment}
        if self.perceptual is not None:
            with autocast(images_BCHW.device, self.in_bf16):
                losses["perceptual"] = self.perceptual(decoded_BCHW, images_BCHW).mean()
            loss = loss + t.perceptual_weight * losses["perceptual"]
        if self.discriminator is not None and self._is_adversarial(step):
            with autocast(images_BCHW.device, self.in_bf16):
                logits_BCHW = self.discriminator(decoded_BCHW)
            losses["adversarial"] = -logits_BCHW.float().mean()
            loss = loss + t.adversarial_weight * losses["adversarial"]
        return {**losses, "loss": loss}, [vectors_BLC, codes_N, decoded_BCHW]

    @torch.no_grad()
    def _init_codebook(self, step: int) -> None:
        """Set the codebook to a random choice of the encoder's vectors of some batches."""
        size = len(self.usage_V)
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < size:
            _, (pixels_BHWC,) = self.read_batch(len(vectors))
            images_BCHW = from_pixels(to_device(pixels_BHWC, self.world.device))
            vectors_NC = self.model.encode_vectors(images_BCHW).flatten(0, 1)
            vectors.append(self.world.gather(vectors_NC))
        self.model.embedding.weight.copy_(self._choose(torch.cat(vectors), size, step))

    def _update_usage(self, codes_N: Tensor) -> None:
        """Update the moving average of each code's usage, 1 if all are used equally."""
        # Not bincount, which waits for a GPU to find the largest code.
        counts_V = torch.zeros(len(self.usage_V), dtype=torch.int64, device=codes_N.device)
        counts_V.index_add_(0, codes_N, torch.ones_like(codes_N))
        counts_V = self.world.sum(counts_V)
        equal = len(codes_N) * self.world.size / len(self.usage_V)
        self.usage_V.lerp_(counts_V / equal, min(1.0, 2.0 / self.training.revive_every))

    @torch.no_grad()
    def _revive(self, vectors_NC: Tensor, step: int) -> float:
        """Move hardly used codes to vectors of this batch; return how many were moved."""
        unused_R = torch.nonzero(self.usage_V < self.training.revive_below).flatten()
        # At most as many as there are vectors, the least used first.
        unused_R = unused_R[self.usage_V[unused_R].argsort(stable=True)][: len(vectors_NC)]
        embedding = self.model.embedding.weight
        embedding[unused_R] = self._choose(vectors_NC, len(unused_R), step)
        for moment in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[embedding][moment][unused_R] = 0.0
        self.usage_V[unused_R] = 1.0
        return float(len(unused_R))

    def _choose(self, vectors_NC: Tensor, count: int, step: int) -> Tensor:
        """Return `count` random vectors (count, C), none twice."""
        order_N = rng.generator(self.training.seed, 2, step).permutation(len(vectors_NC))
        return vectors_NC[torch.from_numpy(order_N[:count]).to(vectors_NC.device)]

    def evaluate(self) -> Mapping[str, float]:
        """Return `reconstruction_metrics` of held-out images; {} in all but the first process."""
        if not self.world.is_main:
            return {}
        limit = self.training.evaluate_images
        return reconstruction_metrics(self.model, self.images.val, self.world.device, limit)

    def parts(self) -> Mapping[str, Part]:
        """Return all that resuming needs."""
        parts: dict[str, Part] = {"model": self.model, "optimizer": self.optimizer}
        parts["usage_V"] = self.usage_V
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator
            parts["judge_optimizer"] = self.discriminator_optimizer  # its name on the disk
        return parts


def train(
    model_config: TokenizerConfig,
    training: TokenizerTraining,
    images: Splits,
    folder: Path,
    world: World = ALONE,
    progress: Progress | None = None,
    execution: loop.Execution = loop.DEFAULT_EXECUTION,
    warm_start: Path | None = None,
) -> VQModel:
    """Train a tokenizer into `folder`, resume its training, or load it if it is finished.

    Writes config.json, metrics.jsonl and model.safetensors. With a `warm_start`, it starts from the
    tokenizer in that folder, and each code keeps its meaning: none is moved to another vector.

    Raises:
        UserError: See `loop.hold` and `TokenizerTrainer`.
        Stopped: See `loop.run`.
    """
    images = images.as_recorded_in(folder / "config.json", "images")
    if (recorded := folder / "config.json").is_file():
        training = optim.as_recorded(training, storage.load_json(recorded).get("training"))
    if warm_start is not None:
        training = continued(training)
    description = {
        "model": config.to_json(model_config),
        "training": config.to_json(training),
        "images": images.train.fingerprint,
    }
    if warm_start is not None:
        description["warm_start"] = storage.hash_file(warm_start / "model.safetensors")
    with loop.hold(folder, description, world) as unfinished:
        if unfinished:
            trainer = TokenizerTrainer(model_config, training, images, world, execution, warm_start)
            loop.run(
                trainer, folder, training.steps,
                evaluate_every=training.evaluate_every, evaluate_first=warm_start is not None,
                progress=progress, world=world,
            )  # fmt: skip
            loop.finish(folder, trainer.model.state_dict(), world)
    return load_tokenizer(folder, world.device)


def continued(training: TokenizerTraining) -> TokenizerTraining:
    """Return the training for a trained tokenizer: its codes are used at once, and none is moved.

    What a code means may drift, but it does not change: transformers that know it can be continued.
    """
    return dataclasses.replace(training, free_until=0.0, revive_until=0.0)
