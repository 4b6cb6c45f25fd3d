"""What an optimization step is made of: batches, learning rate, optimizers, clipping, averages."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ctf.common import threads
from ctf.common.distributed import ALONE, World, full_tensor
from ctf.common.errors import UserError
from ctf.common.rng import generator
from ctf.training.muon import Muon

NAMED_IMAGES = 8  # how many of a batch an error names

SMALLEST_PART = 2  # images; for fewer, calling operators takes as long as computing

Schedule = Literal["constant", "cosine"]
Computed = tuple[Mapping[str, Tensor], Sequence[Tensor]]  # means over images; rows of each
# For the weights of hidden layers; AdamW moves all others.
Optimizer = Literal["adamw", "muon"]


def check_training(training: Any) -> None:
    """Check the ranges of the fields that all training configurations have.

    Raises:
        UserError: A value is out of its range; names the first.
    """
    for name in ("steps", "batch_size", "evaluate_every", "evaluate_images"):
        if getattr(training, name) < 1:
            raise UserError(f"{name}: got {getattr(training, name)}, expected 1 or more")
    for name in ("learning_rate", "clip"):
        if not 0 < getattr(training, name) < math.inf:
            raise UserError(f"{name}: got {getattr(training, name)}, expected more than 0")
    for name in ("warm_up", "weight_decay"):
        if not 0 <= getattr(training, name) < math.inf:
            raise UserError(f"{name}: got {getattr(training, name)}, expected 0 or more")
    if len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas):
        raise UserError(f"betas: got {list(training.betas)}, expected two from 0 to below 1")


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch).permutation(count)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the items of a step's batch, (B,) of `count`.

    Every epoch is a permutation of all items. A batch may span two epochs, so none is cut short.
    """
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    return np.concatenate(
        [
            _epoch_order(count, seed, int(epoch))[positions[positions // count == epoch] % count]
            for epoch in np.unique(positions // count)
        ]
    )


def learning_rate(
    step: int, steps: int, peak: float, warm_up: int, schedule: Schedule, final: float
) -> float:
    """Return the rate of a step: linear warm-up, then constant or half a cosine to final * peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if schedule == "constant":
        return peak
    elapsed = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * elapsed)))


Training = TypeVar("Training", bound=Any)


def as_recorded(training: Training, recorded: object) -> Training:
    """Return a configuration for a training that an earlier version began: there was only AdamW.

    Args:
        training: With a field `optimizer`.
        recorded: The JSON of the configuration that the training was begun with, or anything else.
    """
    if isinstance(recorded, dict) and "optimizer" not in recorded:
        training = dataclasses.replace(training, optimizer=None)
    return training


def make_optimizer(
    module: nn.Module,
    rate: float,
    betas: Sequence[float],
    weight_decay: float,
    hidden: Mapping[nn.Parameter, int] | None = None,
) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and convolutions only, as LlamaGen has it.

    Args:
        module: What is trained.
        rate: Learning rate.
        betas: Of AdamW.
        weight_decay: Of matrices and convolutions.
        hidden: The weights that `Muon` moves, from `muon.hidden_weights`; by default none.
    """
    hidden = hidden or {}
    parameters = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in parameters if p not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    for stacked in sorted({hidden[p] for p in parameters if p in hidden}):
        own = [p for p in parameters if hidden.get(p) == stacked]
        groups.append({"params": own, "weight_decay": weight_decay, "stacked": stacked})
    kind = Muon if hidden else torch.optim.AdamW
    optimizer = kind(groups, lr=rate, betas=(betas[0], betas[1]), fused=True)
    # As the first step would create it, so that a state has the same tensors from the start.
    for parameter in parameters:
        moments = ("momentum",) if parameter in hidden else ("exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),  # unused by Muon, expected by AdamW
            **{moment: torch.zeros_like(parameter.detach()) for moment in moments},
        }
    return optimizer


def backward(
    compute: Callable[..., Computed], batch: Sequence[Tensor], parameters: Iterable[nn.Parameter]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Add the gradients of the mean loss of a batch, which a team of threads computes in parts.

    All is equal to that of the whole batch, up to rounding.

    Args:
        compute: Takes the tensors of a part of the batch. Returns means over its images, of which
            "loss" is the one to differentiate, and tensors with as many rows for each image.
        batch: Tensors with a row for each image.
        parameters: Those that need gradients.

    Returns:
        The means over all images, and the tensors of all images; without gradients.
    """
    images = len(batch[0])
    if len(threads.parts(images, SMALLEST_PART)) == 1:
        means, tensors = compute(*batch)
        means["loss"].backward()
        return {k: mean.detach() for k, mean in means.items()}, [t.detach() for t in tensors]
    parameters = list(parameters)

    def differentiate(*part: Tensor) -> tuple[Computed, Sequence[Tensor | None]]:
        means, tensors = compute(*part)
        share = len(part[0]) / images
        gradients = torch.autograd.grad(means["loss"] * share, parameters, allow_unused=True)
        shares = {name: mean.detach() * share for name, mean in means.items()}
        return (shares, [tensor.detach() for tensor in tensors]), gradients

    results = threads.over_parts(differentiate, *batch, smallest=SMALLEST_PART)
    computed, gradients = zip(*results, strict=True)
    for parameter, *of_parts in zip(parameters, *gradients, strict=True):
        for gradient in of_parts:
            if gradient is None:  # not used
                continue
            if parameter.grad is None:
                # In the parameter's layout, which the fused AdamW takes for granted.
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient)
    shares, tensors = zip(*computed, strict=True)
    means = {name: torch.stack([part[name] for part in shares]).sum() for name in shares[0]}
    return means, [torch.cat(of_parts) for of_parts in zip(*tensors, strict=True)]


def update(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    rate: float,
    clip: float,
    *,
    step: int,
    name: str,
    images_B: np.ndarray,
    checks: Checks | None = None,
) -> Tensor:
    """Clip the gradients of `loss`, take an optimizer step, and return their norm before clipping.

    Loss and gradients are averages over all processes, and are checked to be finite: by default at
    once, before anything has changed. The rest is for error messages: the step, what the loss is
    called, and the indices of the images in the batch.

    Raises:
        UserError: See `Checks`.
    """
    checks = checks or Checks()
    checks.add(loss, name, step, images_B)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # The norm and the clipping of all gradients are a few kernels on a GPU, as is the update.
    norm = full_tensor(nn.utils.clip_grad_norm_(parameters, clip))
    checks.add(norm, f"gradient norm of the {name}", step, images_B)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


class Checks:
    """Checks that losses and gradient norms are finite: at once on a processor, later on a GPU.

    To read a value, one waits until a GPU has computed it, and the GPU then waits for the next
    step. So there the values of some steps are read together, before any of these is saved.

    Args:
        world: All processes, which all check the same values.
        deferred: Whether to hold the values until `check`; by default on anything but a processor.
    """

    def __init__(self, world: World = ALONE, *, deferred: bool | None = None) -> None:
        self.world = world
        self.deferred = world.device.type != "cpu" if deferred is None else deferred
        self._held: list[tuple[Tensor, str, int, np.ndarray]] = []

    def add(self, value: Tensor, name: str, step: int, images_B: np.ndarray) -> None:
        """Check a value of a step, now or later; raises as `check`."""
        self._held.append((value.detach(), name, step, images_B))
        if not self.deferred:
            self.check()

    def check(self) -> None:
        """Check the values that are held.

        Raises:
            UserError: One of them is not finite; in all processes, for the first such value.
        """
        held, self._held = self._held, []
        if not held:
            return
        numbers = torch.stack([value.float() for value, *_ in held]).tolist()
        for number, (_, name, step, images_B) in zip(numbers, held, strict=True):
            if not math.isfinite(number):
                listed = ", ".join(map(str, images_B[:NAMED_IMAGES]))
                more = ", ..." * (len(images_B) > NAMED_IMAGES)
                when = "" if self.deferred else " before the update"
                raise self.world.error(
                    f"step {step}: {name} is {number} on a batch of {len(images_B)}, the images "
                    f"{listed}{more}; stopped{when}, and the last state is good\n"
                    "a lower learning rate usually helps: --set ...learning_rate=..., in a new "
                    "folder"
                )


def update_ema(ema: Mapping[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Move the averages towards the parameters; early steps decay faster, for short trainings."""
    decay = min(decay, (1 + step) / (10 + step))
    own = dict(module.named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), [own[name] for name in ema], 1 - decay)
