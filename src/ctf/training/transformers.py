"""Training of the coarse and the fine model on tokens: one trainer, the objective is an argument.

Shapes: B batch, L tokens of an image, K clusters, S members of the largest cluster.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as checkpointed

from ctf import kernels
from ctf.common import rng
from ctf.common.distributed import World
from ctf.common.errors import UserError
from ctf.common.precision import uses_bf16
from ctf.data.tokens import Tokens
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.objectives import Objective
from ctf.training import optim
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.state import Part

Model = CoarseModel | FineModel


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: LlamaGen's AdamW, with warm-up, cosine and EMA."""

    steps: int = 100_000
    batch_size: int = 256  # images
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.02  # of the peak
    warm_up: int = 100  # steps
    schedule: optim.Schedule = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    class_dropout: float = 0.1  # how often the class is hidden, for classifier-free guidance
    ema: float = 0.999
    evaluate_every: int = 500  # steps
    evaluate_images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        optim.check_training(self)
        for name in ("class_dropout", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 to 1")


class Loss(nn.Module):
    """A model and its objective as one module: what uses the weights is within one forward pass,
    as DDP and FSDP expect it."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        return self.objective(self.model, codes_BL, classes_B)


class Trainer:
    """A model, its moving average and its optimiser: a `loop.Trainable`.

    It is evaluated by `objective` and trained on `training_objective`, by default the same.
    Every process of the world trains on its share of each batch and ends with the same weights.
    Products may be in bfloat16, as `Execution.precision` says; weights and optimiser are not.

    Raises:
        UserError: the batch cannot be shared equally among the processes, or the device has no
            products of the precision asked for.
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
    ) -> None:
        self.model, self.training, self.world = model, training, world
        self.train, self.val = train, val
        self.in_bf16 = uses_bf16(execution.precision, world.device)
        self.share = world.share(training.batch_size, "batch_size")
        each = self.share.stop - self.share.start
        self.micro_batch = min(each, execution.micro_batch or each)
        model.to(world.device).train()
        world.broadcast_module(model)
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        trained = Loss(model, training_objective or objective)
        self.evaluated = Loss(self.averaged, objective)
        kernels.for_evaluation(self.averaged)
        kernels.for_training(model, compile=execution.compile)
        if execution.checkpoint_activations:
            for layer in model.backbone.layers:  # within the hooks of FSDP, which gather weights
                layer.forward = functools.partial(checkpointed, layer.forward, use_reentrant=False)
        if execution.shard and world.size > 1:
            mesh = init_device_mesh(world.device.type, (world.size,))
            for loss in (trained, self.evaluated):
                for layer in loss.model.backbone.layers:
                    fully_shard(layer, mesh=mesh)
            fully_shard(trained, mesh=mesh)
            # Nothing follows that would cut it up again.
            fully_shard(self.evaluated, mesh=mesh, reshard_after_forward=True)
            self.trained: nn.Module = trained
        else:
            self.trained = world.wrap(trained)
        self.ema = dict(self.averaged.named_parameters())
        self.optimizer = optim.make_optimizer(
            model, training.learning_rate, training.betas, training.weight_decay
        )

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        t = self.training
        rate = optim.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        pictures_B, codes_BL, classes_B = self._batch(step)
        rng.seed_dropout(t.seed, 4, step, *([self.world.rank] if self.world.rank else []))
        self.optimizer.zero_grad(set_to_none=True)
        count, total = len(codes_BL), torch.zeros((), device=self.world.device)
        for start in range(0, count, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            with self._messages(wanted=part.stop >= count):
                with self._precision():
                    loss = self.trained(codes_BL[part], classes_B[part])
                loss = loss * (len(codes_BL[part]) / count)
                loss.backward()
            total += loss.detach()
        mean = self.world.mean(total)
        norm = optim.update(
            self.optimizer, mean, rate, t.clip,
            step=step, name="loss", images_B=pictures_B, world=self.world,
        )  # fmt: skip
        optim.update_ema(self.ema, self.model, t.ema, step)
        tokens = t.batch_size * self.model.config.length
        return {"loss": mean, "gradient_norm": norm, "learning_rate": rate, "tokens": tokens}

    @contextlib.contextmanager
    def _messages(self, *, wanted: bool) -> Iterator[None]:
        """Gradients go to the other processes after the last part of a batch only."""
        if isinstance(self.trained, FSDPModule):
            self.trained.set_requires_gradient_sync(wanted)
        if isinstance(self.trained, DistributedDataParallel) and not wanted:
            with self.trained.no_sync():
                yield
        else:
            yield

    def _precision(self) -> torch.autocast:
        # No weight is used twice in a pass, so a copy of it need not wait for that.
        kind = self.world.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.in_bf16, cache_enabled=False)

    def _batch(self, step: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """The pictures of a batch, which are the same for any number of processes, and codes and
        classes of this process's share."""
        t = self.training
        random = rng.generator(t.seed, 3, step)
        indices_B = optim.batch_indices(len(self.train), t.batch_size, t.seed, step)
        views_B = random.integers(self.train.views, size=t.batch_size)
        hidden_B = random.random(t.batch_size) < t.class_dropout
        classes_B = np.where(hidden_B, self.model.no_class, self.train.classes_N[indices_B])
        codes_BL = self.train.codes(indices_B[self.share], views_B[self.share])
        return indices_B, *self._placed(codes_BL, classes_B[self.share])

    def _placed(self, codes_BL: Tensor, classes_B: np.ndarray) -> tuple[Tensor, Tensor]:
        device = self.world.device
        return codes_BL.to(device), torch.from_numpy(classes_B).to(device)

    def evaluate(self) -> Mapping[str, float]:
        """Mean cross-entropy of held-out tokens under the averaged weights, nats a token."""
        count = min(len(self.val), self.training.evaluate_images)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        together = self.world.size * self.micro_batch
        # Not inference_mode: what FSDP gathers in it could not be trained on.
        with torch.no_grad(), self._precision():
            for first in range(0, count, together):
                start = first + self.world.rank * self.micro_batch
                indices_B = np.arange(start, min(start + self.micro_batch, count))
                weight = len(indices_B)
                if not weight:  # others wait for this process's part of the weights
                    indices_B = np.zeros(1, np.int64)
                batch = self._placed(self.val.codes(indices_B), self.val.classes_N[indices_B])
                total += weight * self.evaluated(*batch).double()
        return {"loss": float(self.world.sum(total)) / count}

    def parts(self) -> Mapping[str, Part]:
        """Return all that resuming needs."""
        return {"model": self.model, "ema": self.averaged, "optimizer": self.optimizer}
