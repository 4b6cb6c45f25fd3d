"""Random numbers that depend only on a key such as (seed, step), so any step can be repeated."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> np.random.Generator:
    """Return a generator that depends only on the key, e.g. (seed, rank, step)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def seed_dropout(*key: int) -> None:
    """Seed torch's global generator from the key: dropout takes no generator of its own."""
    torch.manual_seed(int(generator(*key).integers(2**63)))
