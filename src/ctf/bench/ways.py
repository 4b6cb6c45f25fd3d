"""Ways from images to a model that generates such images, in a training of some minutes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ctf.common import config
from ctf.common.progress import OpenProgress
from ctf.data.image_set import Splits
from ctf.evaluation.sample_cache import ImageModel
from ctf.training import fit
from ctf.training.recipes import STAGES, check_recipe, resolve


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model and what it took.

    Attributes:
        model: Generates images.
        seconds: Of training, through all interruptions and without them.
        steps: Of each network that was trained.
        parameters: Of all networks that sampling an image needs, and the tokenizer's encoder.
    """

    model: ImageModel
    seconds: float
    steps: dict[str, int]
    parameters: int


class Way(Protocol):
    """What is compared: a recipe, or another library."""

    @property
    def name(self) -> str:
        """For tables and names of folders."""

    def describe(self, images: Splits) -> dict[str, Any]:
        """Return all settings of training and sampling with these images, as plain values.

        Raises:
            UserError: It cannot be trained on them.
        """

    def train(
        self,
        images: Splits,
        folder: Path,
        minutes: float,
        device: torch.device,
        open_progress: OpenProgress,
    ) -> Trained:
        """Train for some minutes, resume the training in `folder`, or load what it ended with."""


@dataclasses.dataclass(frozen=True)
class CtfFit:
    """`ctf fit --minutes` with a preset."""

    preset: str

    @property
    def name(self) -> str:
        """See `Way.name`."""
        return f"ctf {self.preset}"

    def describe(self, images: Splits) -> dict[str, Any]:
        """See `Way.describe`."""
        recipe = resolve(self.preset, images)
        check_recipe(images, recipe)
        return {"recipe": config.to_json(recipe)}

    def train(
        self,
        images: Splits,
        folder: Path,
        minutes: float,
        device: torch.device,
        open_progress: OpenProgress,
    ) -> Trained:
        """See `Way.train`."""
        pipe = fit.fit(
            images, folder, resolve(self.preset, images),
            minutes=minutes, device=device, open_progress=open_progress,
        )  # fmt: skip
        tokenizer = pipe.tokenizer
        assert isinstance(tokenizer, nn.Module)
        pipe.window = 1  # a large batch gains little from more
        seconds: dict[str, float] = pipe.origin["seconds"]
        recipe: dict[str, Any] = pipe.origin["recipe"]
        return Trained(
            pipe,
            sum(seconds.values()),
            {stage: recipe[f"{stage}_training"]["steps"] for stage in STAGES if stage in seconds},
            parameter_count(tokenizer, pipe.coarse, *([] if pipe.fine is None else [pipe.fine])),
        )


def parameter_count(*networks: nn.Module) -> int:
    """Return the number of parameters of all networks."""
    return sum(p.numel() for network in networks for p in network.parameters())
