"""A small coarse model, and what it computes."""

import dataclasses

import torch
from torch import nn

from ctf.models.coarse import CoarseModel
from ctf.models.transformer import TransformerConfig

CONFIG = TransformerConfig(width=64, layers=3, heads=4, grid=4, classes=5, dropout=0.1)
VOCAB_SIZE = 40


def make_coarse(width: int = CONFIG.width) -> CoarseModel:
    torch.manual_seed(0)
    model = CoarseModel(dataclasses.replace(CONFIG, width=width), VOCAB_SIZE)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def logits(model: CoarseModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    labels_BL = torch.randint(VOCAB_SIZE, (6, CONFIG.length), generator=generator)
    return model(labels_BL, torch.arange(6) % 6)
