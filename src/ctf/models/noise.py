"""Random numbers of sampling: one for each image, stage, position and choice, from the seed alone.

They are Gumbel noise, g = -log(-log u). Added to logits, the largest sum is at choice k with
probability softmax(logits)_k, exactly (the Gumbel-max trick, see arXiv 2110.01515). So the choice
at a position is a function of its logits and its noise, in whatever order and however often
positions are computed.

u comes from SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), a generator that is a function of a
counter: output i of state s is mix(s + i * GOLDEN). The outputs of an image's seed are states, one
for each stage and position, and the outputs of these are the numbers of their choices. Integer
arithmetic is the same on every device; only the two logarithms are the device's own.

Shapes: B images, 2 stages (coarse, fine), L tokens of an image, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VERSION = 2  # of the numbers that a seed stands for; stored with settings of samples
STAGE = 1 << 32  # outputs of a seed from the first of one stage to that of the next
TABLE = 1 << 20  # numbers that are computed at once, if these are all: 8 MiB
BITS = 52  # of a number: u is the middle of one of 2 ** 52 equal intervals, so 0 < u < 1


def _signed(bits: int) -> int:
    """An integer of 64 bits as int64 has it."""
    return bits - (bits >> 63 << 64)


GOLDEN = _signed(0x9E3779B97F4A7C15)
FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def splitmix64(state: Tensor, outputs: Tensor) -> Tensor:
    """Outputs of SplitMix64, 1 being the first: int64, of the shape of `state` and `outputs`."""
    z = state + outputs * GOLDEN
    z ^= _shifted(z, 30)
    z *= FACTORS[0]
    z ^= _shifted(z, 27)
    z *= FACTORS[1]
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as if there were no sign."""
    shifted = z >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted


def noise_keys(seeds: Sequence[int], length: int) -> Tensor:
    """What the noise of each image, stage and position is made from: int64 (B, 2, L).

    Row 0 is for the coarse labels, row 1 for the codes. An image's keys depend on its seed alone,
    all 64 bits of it.
    """
    seeds_B = torch.tensor([_signed(seed % 2**64) for seed in seeds])
    # Any constant but 0, from which seed i would be given the state that is key i of seed 0.
    states_B = splitmix64(torch.full_like(seeds_B, VERSION), seeds_B)
    outputs_2L = torch.arange(2)[:, None] * STAGE + torch.arange(1, length + 1)
    return splitmix64(states_B[:, None, None], outputs_2L)


def gumbel_noise(keys: Tensor, choices: int) -> Tensor:
    """The noise of each choice, for keys of any shape: float64 (..., K).

    Numbers of 52 bits give each choice its probability to some 2 ** -52, which is less than the
    rounding of logits in float32 changes.
    """
    outputs_K = torch.arange(1, choices + 1, device=keys.device)
    u = _shifted(splitmix64(keys[..., None], outputs_K), 64 - BITS).double()
    u += 0.5
    u *= 2.0**-BITS
    return u.log_().neg_().log_().neg_()


class Noise:
    """The noise of some images and positions, by index: `noise[:, 3]` is float64 (B, K).

    Where that is little, all of it is computed at once: for few choices, many small operations
    would take longer than what they compute.

    Args:
        keys_BL: A row of `noise_keys`.
        choices: K.
    """

    def __init__(self, keys_BL: Tensor, choices: int) -> None:
        self._keys_BL, self._choices = keys_BL, choices
        small = keys_BL.numel() * choices <= TABLE
        self._table_BLK = gumbel_noise(keys_BL, choices) if small else None

    def __getitem__(self, index: Any) -> Tensor:
        if self._table_BLK is not None:
            return self._table_BLK[index]
        return gumbel_noise(self._keys_BL[index], self._choices)
