"""Randomness that depends on a key alone, e.g. (seed, step): resumable, in any order."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> np.random.Generator:
    """Randomness that depends on the key alone, e.g. (seed, rank, step)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def seed_dropout(*key: int) -> None:
    """Dropout has no generator argument: sets torch's global one from the key alone."""
    torch.manual_seed(int(generator(*key).integers(2**63)))
