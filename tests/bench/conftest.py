"""Benchmarks at toy shapes: 16 tokens, 64 codes."""

import dataclasses

import pytest
import torch

from ctf.bench import harness
from ctf.bench.shapes import Shapes
from ctf.kernels.sampling_cpu import GrowingCache
from ctf.models.sizes import TOKENIZERS, TransformerShape
from ctf.models.tokenizer import TokenizerConfig, VQModel

VQ = TokenizerConfig(image_size=32, channels=16, multipliers=(1, 2), latent_channels=16, groups=4)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    monkeypatch.setattr(harness, "LIMIT_SIDE", 64)
    monkeypatch.setattr(harness, "LIMIT_NUMBERS", 2**12)
    shape = TransformerShape(width=64, layers=2, heads=4, dropout=0.1)
    return Shapes(
        codes=64,
        clusters=8,
        classes=5,
        grid=4,
        sizes=dict.fromkeys(("S", "B", "L"), shape),
        tokenizer=dataclasses.replace(VQ, image_size=8, codebook_size=64),
    )


@pytest.fixture
def tokenizer() -> VQModel:
    torch.manual_seed(0)
    config = dataclasses.replace(
        TOKENIZERS["VQ-16"], image_size=32, channels=16, latent_channels=16, groups=8,
        codebook_size=256,
    )  # fmt: skip
    return VQModel(config).eval()


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that grow within 16 tokens."""
    monkeypatch.setattr(GrowingCache, "BLOCK", 8)
