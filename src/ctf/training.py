"""Training of the coarse and the fine model on tokens: one trainer, the objective is an argument.

Shapes: B batch, L tokens of an image, K clusters, S members of the largest cluster.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf import checkpoint, loop
from ctf.clusters import Clusters
from ctf.coarse import CoarseModel
from ctf.errors import UserError
from ctf.fine import FineModel
from ctf.tokens import Tokens

Model = CoarseModel | FineModel
# (model, codes_BL, classes_B) -> cross-entropy of each token in nats, (B, L)
Objective = Callable[[Model, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: LlamaGen's AdamW, with warm-up, cosine and EMA."""

    steps: int = 100_000
    batch_size: int = 256  # images
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.02  # of the peak
    warm_up: int = 100  # steps
    schedule: loop.Schedule = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    class_dropout: float = 0.1  # how often the class is hidden, for classifier-free guidance
    ema: float = 0.999
    evaluate_every: int = 500  # steps
    evaluate_images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        loop.check(self)
        for name in ("class_dropout", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 to 1")


def coarse_objective(clusters: Clusters) -> Objective:
    """Next label given the class and the labels before it (the paper's section 3.2)."""
    labels_V = clusters.labels_V

    def losses(model: Model, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        labels_BL = labels_V.to(codes_BL.device)[codes_BL]
        return _cross_entropy(model(labels_BL, classes_B), labels_BL)

    return losses


def fine_objective(clusters: Clusters) -> Objective:
    """Each exact code given the class and all true labels (the paper's section 3.2)."""
    labels_V = clusters.labels_V

    def losses(model: Model, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        assert isinstance(model, FineModel)
        labels_BL = labels_V.to(codes_BL.device)[codes_BL]
        return _cross_entropy(model(labels_BL, classes_B), model.choices(codes_BL))

    return losses


def _cross_entropy(logits_BLK: Tensor, targets_BL: Tensor) -> Tensor:
    losses_T = F.cross_entropy(logits_BLK.flatten(0, 1), targets_BL.flatten(), reduction="none")
    return losses_T.view_as(targets_BL)


class Trainer:
    """A model, its moving average and its optimiser: a `loop.Trainable`."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        train: Tokens,
        val: Tokens,
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.model, self.objective, self.training, self.device = model, objective, training, device
        self.train, self.val = train, val
        model.to(device).train()
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.ema = dict(self.averaged.named_parameters())
        self.optimizer = loop.make_optimizer(
            model, training.learning_rate, training.betas, training.weight_decay
        )

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        t = self.training
        rate = loop.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        codes_BL, classes_B = self._batch(step)
        loop.seed_dropout(t.seed, 4, step)
        loss = self.objective(self.model, codes_BL, classes_B).mean()
        norm = loop.update(self.optimizer, loss, rate, t.clip, step, "loss")
        loop.update_ema(self.ema, self.model, t.ema, step)
        return {"loss": loss.detach(), "gradient_norm": norm, "learning_rate": rate}

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        t = self.training
        random = loop.generator(t.seed, 3, step)
        indices_B = loop.batch_indices(len(self.train), t.batch_size, t.seed, step)
        codes_BL = self.train.codes(indices_B, random.integers(self.train.views, size=t.batch_size))
        hidden_B = random.random(t.batch_size) < t.class_dropout
        classes_B = np.where(hidden_B, self.model.no_class, self.train.classes_N[indices_B])
        return codes_BL.to(self.device), torch.from_numpy(classes_B).to(self.device)

    def evaluate(self) -> Mapping[str, float]:
        """Mean cross-entropy of held-out tokens under the averaged weights, nats a token."""
        count = min(len(self.val), self.training.evaluate_images)
        total = 0.0
        with torch.inference_mode():
            for start in range(0, count, self.training.batch_size):
                indices_B = np.arange(start, min(start + self.training.batch_size, count))
                codes_BL = self.val.codes(indices_B).to(self.device)
                classes_B = torch.from_numpy(self.val.classes_N[indices_B]).to(self.device)
                losses_BL = self.objective(self.averaged, codes_BL, classes_B)
                total += float(losses_BL.mean(1).double().sum())
        return {"loss": total / count}

    def state(self) -> Mapping[str, Tensor]:
        return {
            **loop.prefixed(self.model.state_dict(), "model."),
            **loop.prefixed(self.averaged.state_dict(), "ema."),
            **loop.optimizer_state(self.optimizer, "optimizer."),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        checkpoint.load_strict(self.model, loop.with_prefix(tensors, "model."), "state")
        checkpoint.load_strict(self.averaged, loop.with_prefix(tensors, "ema."), "state")
        loop.load_optimizer_state(self.optimizer, tensors, "optimizer.")
