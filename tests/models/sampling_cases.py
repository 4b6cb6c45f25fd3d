"""A small model of both stages, its sampling by definition, and what goes through it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise
from ctf.models.sampling import Sampling, sample_logits
from ctf.models.transformer import TransformerConfig

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
L = CONFIG.length
LABELS_V = torch.randint(8, (40,), generator=torch.Generator().manual_seed(3))
CLUSTERS = Clusters.from_labels(LABELS_V)
CLASSES_B = torch.tensor([0, 2, 1, 2, 0])
SEEDS = [5, 6, 7, 8, 9]


def randomise(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)


def make_coarse() -> CoarseModel:
    model = CoarseModel(CONFIG, CLUSTERS.count).eval()
    randomise(model)
    return model


def make_fine() -> FineModel:
    model = FineModel(CONFIG, CLUSTERS).eval()
    randomise(model)
    return model


SETTINGS = [
    Sampling(guidance=1.0),
    Sampling(guidance=2.5, fine_guidance=1.5, temperature=1.2, fine_temperature=0.8),
    Sampling(guidance=0.0, fine_guidance=0.0, top_k=3, fine_top_p=0.7),
    Sampling(top_p=0.8, fine_top_k=2),
]


WINDOWS = [
    Sampling(guidance=3.0, guidance_window=(0.0, 0.5)),
    Sampling(guidance=3.0, guidance_window=(0.5, 1.0), top_k=1),
    Sampling(guidance=3.0, guidance_window=(0.3, 0.7), guidance_schedule="cosine"),
    Sampling(guidance=-1.0, guidance_schedule="linear"),
    Sampling(guidance=2.5, guidance_schedule="cosine", temperature=0.8, top_p=0.9),
]


@torch.no_grad()
def plain_coarse(
    model: CoarseModel, keys_BL: Tensor, settings: Sampling, kept_BL: Tensor | None = None
) -> Tensor:
    """The definition: no cache, two passes, the guided logits of one position after another."""
    labels_BL = torch.zeros(keys_BL.shape, dtype=torch.int64)
    first, last = settings.guidance_window
    for position in range(L):
        cond = model(labels_BL, CLASSES_B)[:, position]
        uncond = model(labels_BL, torch.full_like(CLASSES_B, model.no_class))[:, position]
        r = position / (L - 1)
        rise = {"constant": 1, "linear": r, "cosine": 0.5 - 0.5 * math.cos(math.pi * r)}
        scale = 1 + (settings.guidance - 1) * rise[settings.guidance_schedule]
        if not first <= position / L < last:
            scale = 1
        logits = uncond + scale * (cond - uncond)
        labels_BL[:, position] = sample_logits(
            logits,
            gumbel_noise(keys_BL[:, position], CLUSTERS.count),
            settings.temperature,
            settings.top_k,
            settings.top_p,
        )
        if kept_BL is not None:
            for b in range(len(kept_BL)):
                if kept_BL[b, position] >= 0:
                    labels_BL[b, position] = kept_BL[b, position]
    return labels_BL


@contextmanager
def recorded(*models: nn.Module) -> Iterator[tuple[list[tuple[int, ...]], list[Tensor]]]:
    """What goes through the first block of each, as (batch, positions); and all logits."""
    shapes: list[tuple[int, ...]] = []
    logits: list[Tensor] = []
    hooks = [
        *(m.backbone.layers[0].register_forward_pre_hook(
            lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2]))
        ) for m in models),
        *(m.head.register_forward_hook(
            lambda _, inputs, result: logits.append(result.clone())
        ) for m in models),
    ]  # fmt: skip
    try:
        yield shapes, logits
    finally:
        for hook in hooks:
            hook.remove()
