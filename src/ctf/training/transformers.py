"""Training of the coarse and the fine model on tokens: one trainer for any objective.

Shapes: B batch, L tokens of an image.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ctf import kernels
from ctf.common import config, rng, threads
from ctf.common.distributed import World
from ctf.common.errors import UserError
from ctf.common.precision import uses_bf16
from ctf.data.tokens import Tokens
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.objectives import Objective
from ctf.training import muon, optim
from ctf.training.batches import Batch, Batches, to_device
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.state import Part

Model = CoarseModel | FineModel
FEW_IMAGES = 10_000
ENOUGH_HELD_OUT = 10


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters of a training: LlamaGen's, with warm-up, cosine decay and EMA."""

    steps: int = 100_000
    batch_size: int = 256  # images
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.02  # of the peak
    warm_up: int = 100  # steps
    schedule: optim.Schedule = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    class_dropout: float = 0.1  # share of images without their class, for guidance
    ema: float = 0.999
    evaluate_every: int = 500  # steps
    evaluate_images: int = 1000
    seed: int = 0
    # None is AdamW, as in recipes of before there was a choice.
    optimizer: optim.Optimizer | None = dataclasses.field(
        default=None, metadata=config.OMIT_DEFAULT
    )
    # The weights that are kept: the last, or those of the lowest held-out loss; "auto" is "best"
    # for few images, see `keeps_best`.
    keep: Literal["auto", "best", "last"] = dataclasses.field(
        default="auto", metadata=config.OMIT_DEFAULT
    )

    def __post_init__(self) -> None:
        optim.check_training(self)
        for name in ("class_dropout", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 to 1")


def keeps_best(training: TrainingConfig, images: int, held_out: int) -> bool:
    """Return whether the weights of the best evaluation are kept.

    "auto": if there are few images, whose held-out loss turns, and enough held-out ones to tell.
    """
    if training.keep == "auto":
        return images < FEW_IMAGES and held_out >= ENOUGH_HELD_OUT
    return training.keep == "best"


def best_evaluations(training: TrainingConfig, held_out: int) -> int:
    """Return after how many steps each to evaluate, to find the best weights.

    Twenty times in a training, or fewer if that would take more than about 5 % of its time: a
    held-out image takes a third of the time of one that is trained on.
    """
    evaluated = max(1, min(held_out, training.evaluate_images)) / 3
    times = int(0.05 * training.steps * training.batch_size / evaluated)
    return min(training.evaluate_every, training.steps // max(1, min(20, times)))


class Loss(nn.Module):
    """A model and its objective as one module, as DDP and FSDP expect: one forward pass."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        """Loss in nats a token, a scalar."""
        return self.objective(self.model, codes_BL, classes_B)


class Trainer:
    """A model, its exponential moving average and its optimizer: a `loop.Trainable`.

    Each process trains on its share of the batch, and all end with the same weights. Weights,
    average and optimizer are in float32; products may be in bfloat16.

    Args:
        model: On any device.
        objective: What the average is evaluated by.
        train: Tokens to train on.
        val: Held-out tokens.
        training: Hyperparameters.
        world: All processes, and the device of this one.
        execution: How a step is computed.
        training_objective: What the model is trained on, by default `objective`.
        in_parts: Whether the loss of a batch is the mean of those of its images, and draws no
            random numbers, so that threads can compute parts of a batch.

    Raises:
        UserError: The batch size is no multiple of the processes, or the device does not support
            the precision.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        train: Tokens,
        val: Tokens,
        training: TrainingConfig,
        world: World,
        execution: Execution = DEFAULT_EXECUTION,
        training_objective: Objective | None = None,
        in_parts: bool = True,
    ) -> None:
        self.model, self.training, self.world = model, training, world
        self.train, self.val = train, val
        self.in_bf16 = uses_bf16(execution.precision, world.device)
        self.share = world.share(training.batch_size, "batch_size")
        share_size = self.share.stop - self.share.start
        self.micro_batch = min(share_size, execution.micro_batch or share_size)
        model.to(world.device).train()
        world.broadcast_module(model)
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        kernels.for_evaluation(self.averaged)
        kernels.for_training(model, compile=execution.compile)
        if execution.checkpoint_activations:
            for layer in model.backbone.layers:  # inside of FSDP's hooks, which gather the weights
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        trained = Loss(model, training_objective or objective)
        self.evaluated = Loss(self.averaged, objective)
        if execution.shard and world.size > 1:
            self.trained: nn.Module = shard(trained, world)
            # No backward pass follows, so the root must give its weights up by itself.
            shard(self.evaluated, world, reshard_after_forward=True)
        else:
            self.trained = world.wrap(trained)
        self.ema = dict(self.averaged.named_parameters())
        self.in_parts = (
            in_parts
            and threads.pays(world.device, world.size)
            and not (model.config.dropout or execution.compile)
        )
        self.batches = Batches(self.read_batch, training.steps, world.device)
        self.checks = optim.Checks(world)
        hidden = muon.hidden_weights(*model.backbone.layers)
        self.optimizer = optim.make_optimizer(
            model,
            training.learning_rate,
            training.betas,
            training.weight_decay,
            hidden if training.optimizer == "muon" else None,
        )

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take the optimizer step number `step`, counted from 0, and return its metrics."""
        t = self.training
        rate = optim.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        indices_B, (codes_BL, classes_B) = self.batches(step)
        rng.seed_dropout(t.seed, 4, step, *([self.world.rank] if self.world.rank else []))
        self.optimizer.zero_grad(set_to_none=True)
        images, total = len(codes_BL), torch.zeros((), device=self.world.device)
        for start in range(0, images, self.micro_batch):
            micro = slice(start, start + self.micro_batch)
            batch = codes_BL[micro], classes_B[micro]
            compute = functools.partial(self._loss, len(batch[0]) / images)
            with self._gradient_sync(micro.stop >= images):
                means, _ = optim.backward(compute, batch, self.model.parameters())
            total += means["loss"]
        mean = self.world.mean(total)
        norm = optim.update(
            self.optimizer, mean, rate, t.clip,
            step=step, name="loss", images_B=indices_B, checks=self.checks,
        )  # fmt: skip
        optim.update_ema(self.ema, self.model, t.ema, step)
        tokens = t.batch_size * self.model.config.length
        return {"loss": mean, "gradient_norm": norm, "learning_rate": rate, "tokens": tokens}

    def _loss(self, weight: float, codes_BL: Tensor, classes_B: Tensor) -> optim.Computed:
        with self._autocast():
            loss = self.trained(codes_BL, classes_B)
        return {"loss": loss * weight}, []

    def read_batch(self, step: int) -> Batch:
        """Indices of the images of all processes' batch; codes and classes of this one's share."""
        t = self.training
        random = rng.generator(t.seed, 3, step)
        indices_B = optim.batch_indices(len(self.train), t.batch_size, t.seed, step)
        views_B = random.integers(self.train.views, size=t.batch_size)
        dropped_B = random.random(t.batch_size) < t.class_dropout
        classes_B = np.where(dropped_B, self.model.no_class, self.train.classes_N[indices_B])
        codes_BL = self.train.codes(indices_B[self.share], views_B[self.share])
        return indices_B, [codes_BL, torch.from_numpy(classes_B[self.share])]

    def check(self) -> None:
        """Raise a UserError if the loss or the gradient of a step since was not finite."""
        self.checks.check()

    def evaluate(self) -> Mapping[str, float]:
        """Mean cross-entropy of held-out tokens under the averaged weights, in nats a token."""
        images = min(len(self.val), self.training.evaluate_images)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        # Not inference_mode: weights that FSDP gathers in it could not be trained.
        with torch.no_grad(), self._autocast():
            for first in range(0, images, self.world.size * self.micro_batch):
                start = first + self.world.rank * self.micro_batch
                indices_B = np.arange(start, min(start + self.micro_batch, images))
                weight = len(indices_B)
                if not weight:  # the others need this process's shards of the weights
                    indices_B = np.zeros(1, np.int64)
                classes_B = torch.from_numpy(self.val.classes_N[indices_B])
                batch = [
                    to_device(tensor, self.world.device)
                    for tensor in (self.val.codes(indices_B), classes_B)
                ]
                losses = threads.over_parts(
                    self._sum_of_losses, *batch, smallest=optim.SMALLEST_PART
                )
                total += weight / len(indices_B) * torch.stack(losses).sum()
        return {"loss": float(self.world.sum(total)) / images}

    def _sum_of_losses(self, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        return len(codes_BL) * self.evaluated(codes_BL, classes_B).double()

    def parts(self) -> Mapping[str, Part]:
        """All that resuming needs."""
        return {"model": self.model, "ema": self.averaged, "optimizer": self.optimizer}

    @contextlib.contextmanager
    def _gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Average gradients over the processes, or only accumulate them."""
        if isinstance(self.trained, FSDPModule):
            self.trained.set_requires_gradient_sync(enabled)
        if isinstance(self.trained, DistributedDataParallel) and not enabled:
            with self.trained.no_sync():
                yield
        else:
            yield

    def _autocast(self) -> torch.autocast:
        # Uncached: no weight is used twice in a pass.
        device = self.world.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.in_bf16, cache_enabled=False)


def shard(loss: Loss, world: World, reshard_after_forward: bool | None = None) -> Loss:
    """Shard all weights over the processes, gathered block by block (FSDP2)."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in loss.model.backbone.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loss, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return loss
