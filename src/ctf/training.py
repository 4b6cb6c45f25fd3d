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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctf import checkpoint, loop
from ctf.clusters import Clusters
from ctf.coarse import CoarseModel
from ctf.distributed import World
from ctf.errors import UserError
from ctf.fine import FineModel
from ctf.tokens import Tokens

Model = CoarseModel | FineModel
# (model, codes_BL, classes_B) -> cross-entropy of each token in nats, (B, L). The model may be
# wrapped, to share its gradients with other processes.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


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

    def losses(model: nn.Module, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        labels_BL = labels_V.to(codes_BL.device)[codes_BL]
        return _cross_entropy(model(labels_BL, classes_B), labels_BL)

    return losses


def fine_objective(clusters: Clusters) -> Objective:
    """Each exact code given the class and all true labels (the paper's section 3.2)."""
    labels_V = clusters.labels_V

    def losses(model: nn.Module, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        labels_BL = labels_V.to(codes_BL.device)[codes_BL]
        fine = model.module if isinstance(model, DistributedDataParallel) else model
        assert isinstance(fine, FineModel)
        return _cross_entropy(model(labels_BL, classes_B), fine.choices(codes_BL))

    return losses


def grouped_objective(groups: Clusters, weight: float) -> Objective:
    """What a full-vocabulary model learns with the cluster loss of IAR (arXiv 2501.00880).

    To the cross-entropy of each code comes `weight` times that of its group, whose probability is
    the sum of its members'.
    """
    labels_V, members_KS = groups.labels_V, groups.members_KS

    def losses(model: nn.Module, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        logs_TV = model(codes_BL, classes_B).flatten(0, 1).log_softmax(-1)
        own_T = logs_TV.gather(1, codes_BL.view(-1, 1))[:, 0]
        # Only the group of the right code is asked for: the sum over its members.
        device = codes_BL.device
        members_TS = members_KS.to(device)[labels_V.to(device)[codes_BL.flatten()]]
        logs_TS = logs_TV.gather(1, members_TS.clamp(min=0))
        group_T = logs_TS.masked_fill(members_TS < 0, -torch.inf).logsumexp(-1)
        return -(own_T + weight * group_T).view_as(codes_BL)

    return losses


def corrupted_objective(clusters: Clusters, share: float) -> Objective:
    """What a fine model learns that is to bear mistakes of the coarse one.

    Each label is, with probability `share`, that of another token of the batch. Such a token has no
    right answer among the members of its wrong cluster: nothing is asked of it there. With softmax
    "full" it has, and it is asked.
    """
    labels_V = clusters.labels_V

    def losses(model: nn.Module, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        labels_BL = labels_V.to(codes_BL.device)[codes_BL]
        fine = model.module if isinstance(model, DistributedDataParallel) else model
        assert isinstance(fine, FineModel)
        # From torch's global generator, which is set for each step.
        wrong_BL = torch.rand(labels_BL.shape, device=labels_BL.device) < share
        order_T = torch.randperm(labels_BL.numel(), device=labels_BL.device)
        others_BL = labels_BL.flatten()[order_T].view_as(labels_BL)
        logits_BLS = model(torch.where(wrong_BL, others_BL, labels_BL), classes_B)
        if fine.softmax == "full":
            return _cross_entropy(logits_BLS, codes_BL)
        choices_BL = fine.choices(codes_BL).masked_fill(wrong_BL, 0)  # any cluster has a first one
        return _cross_entropy(logits_BLS, choices_BL).masked_fill(wrong_BL, 0)

    return losses


def _cross_entropy(logits_BLK: Tensor, targets_BL: Tensor) -> Tensor:
    losses_T = F.cross_entropy(logits_BLK.flatten(0, 1), targets_BL.flatten(), reduction="none")
    return losses_T.view_as(targets_BL)


class Trainer:
    """A model, its moving average and its optimiser: a `loop.Trainable`.

    `taught` is what it learns, where that is not the `objective` that it is evaluated by.
    Every process of the world trains on its share of each batch and ends with the same weights.
    GPUs compute in bfloat16 where they can, with weights and optimiser in single precision.

    Raises:
        UserError: the batch cannot be shared equally among the processes.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        train: Tokens,
        val: Tokens,
        training: TrainingConfig,
        world: World,
        taught: Objective | None = None,
    ) -> None:
        self.model, self.objective, self.training, self.world = model, objective, training, world
        self.taught = taught
        self.train, self.val = train, val
        self.share = world.share(training.batch_size, "batch_size")
        model.to(world.device).train()
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.ema = dict(self.averaged.named_parameters())
        self.optimizer = loop.make_optimizer(
            model, training.learning_rate, training.betas, training.weight_decay
        )
        self.shared: nn.Module = model
        if world.size > 1:
            self.shared = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begins with these weights of the model instead of random ones."""
        checkpoint.load_strict(self.model, weights, "the first weights")
        self.world.give(self.model)
        self.averaged.load_state_dict(self.model.state_dict())

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        t = self.training
        rate = loop.learning_rate(
            step, t.steps, t.learning_rate, t.warm_up, t.schedule, t.final_learning_rate
        )
        codes_BL, classes_B = self._batch(step)
        loop.seed_dropout(t.seed, 4, step, *([self.world.rank] if self.world.rank else []))
        with self._precision():
            taught = self.taught or self.objective
            loss = taught(self.shared, codes_BL, classes_B).mean()
        norm = loop.update(self.optimizer, loss, rate, t.clip, step, "loss")
        loop.update_ema(self.ema, self.model, t.ema, step)
        mean = self.world.sum(loss.detach()) / self.world.size
        tokens = t.batch_size * self.model.config.length
        return {"loss": mean, "gradient_norm": norm, "learning_rate": rate, "tokens": tokens}

    def _precision(self) -> torch.autocast:
        kind = self.world.device.type
        able = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(kind, torch.bfloat16, enabled=able)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of a batch, which is the same for any number of processes."""
        t = self.training
        random = loop.generator(t.seed, 3, step)
        indices_B = loop.batch_indices(len(self.train), t.batch_size, t.seed, step)
        views_B = random.integers(self.train.views, size=t.batch_size)
        hidden_B = random.random(t.batch_size) < t.class_dropout
        classes_B = np.where(hidden_B, self.model.no_class, self.train.classes_N[indices_B])
        codes_BL = self.train.codes(indices_B[self.share], views_B[self.share])
        return self._placed(codes_BL, classes_B[self.share])

    def _placed(self, codes_BL: Tensor, classes_B: np.ndarray) -> tuple[Tensor, Tensor]:
        device = self.world.device
        return codes_BL.to(device), torch.from_numpy(classes_B).to(device)

    def evaluate(self) -> Mapping[str, float]:
        """Mean cross-entropy of held-out tokens under the averaged weights, nats a token."""
        count, size = min(len(self.val), self.training.evaluate_images), self.training.batch_size
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with torch.inference_mode(), self._precision():
            for start in range(self.world.rank * size, count, self.world.size * size):
                indices_B = np.arange(start, min(start + size, count))
                batch = self._placed(self.val.codes(indices_B), self.val.classes_N[indices_B])
                losses_BL = self.objective(self.averaged, *batch)
                total += losses_BL.mean(1).double().sum()
        return {"loss": float(self.world.sum(total)) / count}

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
