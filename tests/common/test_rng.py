"""Random numbers depend only on their key."""

import numpy as np
import torch

from ctf.common import rng


def test_numbers_depend_on_the_key_alone() -> None:
    first = rng.generator(0, 3, 5).random(4)
    rng.generator(9).random(100)
    assert (rng.generator(0, 3, 5).random(4) == first).all()
    assert not np.isclose(rng.generator(0, 5, 3).random(4), first).any()
    rng.seed_dropout(0, 4, 1)
    mask = torch.rand(4)
    torch.rand(100)
    rng.seed_dropout(0, 4, 1)
    assert torch.equal(torch.rand(4), mask)
