"""The noise of sampling against known answers and against its distribution, with fixed seeds."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctf.models import noise
from ctf.models.noise import Noise, gumbel_noise, noise_keys, splitmix64

seeds = st.integers(-(2**63), 2**63 - 1)


def uniform(noise_K: torch.Tensor) -> np.ndarray:
    """u of g = -log(-log u)."""
    return np.asarray((-(-noise_K).exp()).exp())


def test_known_answers_of_splitmix64() -> None:
    """The first outputs of the reference implementation (Vigna, splitmix64.c) for two states."""
    for state, expected in (
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [
            6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        ]),
    ):  # fmt: skip
        outputs = splitmix64(torch.tensor(state), torch.arange(1, 5))
        assert [output % 2**64 for output in outputs.tolist()] == expected


@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_noise_is_what_integers_of_python_give(seed: int, position: int, choice: int) -> None:
    def output(state: int, number: int) -> int:
        z = (state + number * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    for stage in (0, 1):
        key = output(output(noise.VERSION, seed % 2**64), (stage << 32) + position)
        u = ((output(key, choice) >> 12) + 0.5) / 2**52
        keys_12L = noise_keys([seed], 40)
        got = gumbel_noise(keys_12L[0, stage, position - 1], 40)[choice - 1]
        assert float(got) == pytest.approx(-math.log(-math.log(u)), rel=1e-12, abs=1e-12)


@given(st.lists(seeds, min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 30))
def test_noise_depends_on_seed_position_and_choice_alone(
    several: list[int], length: int, choices: int
) -> None:
    keys_B2L = noise_keys(several, length)
    assert keys_B2L.shape == (len(several), 2, length) and keys_B2L.dtype == torch.int64
    more_BLK = gumbel_noise(noise_keys([*several, 1], length + 3)[:, 0], choices + 5)
    noise_BLK = gumbel_noise(keys_B2L[:, 0], choices)
    torch.testing.assert_close(more_BLK[:-1, :length, :choices], noise_BLK, rtol=1e-14, atol=1e-15)
    for i in range(length):
        one_BK = gumbel_noise(keys_B2L[:, 0, i], choices)
        torch.testing.assert_close(one_BK, noise_BLK[:, i], rtol=1e-14, atol=1e-15)


def test_all_bits_of_a_seed_count() -> None:
    several = [0, -1, *(1 << bit for bit in range(63)), -(2**63), 2**32 + 1, 2**64 + 7]
    keys_B2L = noise_keys(several, 8)
    assert len(keys_B2L.unique()) == keys_B2L.numel()
    assert torch.equal(noise_keys([7], 8)[0], keys_B2L[-1])


def test_noise_is_finite_for_every_number() -> None:
    """The smallest and the largest number are in (0, 1), and their noise is at its ends."""
    u = (torch.tensor([0, 2**noise.BITS - 1]).double() + 0.5) * 2.0**-noise.BITS
    assert float(u[0]) > 0 and float(u[1]) < 1
    gumbel = -(-u.log()).log()
    assert gumbel.tolist() == pytest.approx([-3.6, 36.7], abs=0.1)


def test_a_table_and_noise_on_demand_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_BL = noise_keys(range(3), 10)[:, 0]
    table = Noise(keys_BL, 20)
    monkeypatch.setattr(noise, "TABLE", 0)
    rows, positions = torch.arange(3)[:, None], torch.tensor([[1, 2], [5, 6], [8, 9]])
    for index in ((slice(None), 4), (rows, positions)):
        torch.testing.assert_close(Noise(keys_BL, 20)[index], table[index], rtol=1e-14, atol=1e-15)
    assert table[rows, positions].shape == (3, 2, 20)


# --- Uniformity and independence ------------------------------------------------------------------

NEIGHBOURS = {
    "seeds": uniform(gumbel_noise(noise_keys(range(20_000), 1)[:, 0, 0], 1)[:, 0]),
    "negative seeds": uniform(gumbel_noise(noise_keys(range(-9_000, 0), 1)[:, 1, 0], 2)[:, 1]),
    "high seeds": uniform(
        gumbel_noise(noise_keys([i << 40 for i in range(9_000)], 1)[:, 0, 0], 1)[:, 0]
    ),
    "positions": uniform(gumbel_noise(noise_keys([0], 20_000)[0, 0], 1)[:, 0]),
    "choices": uniform(gumbel_noise(noise_keys([0], 1)[0, 0], 20_000)[0]),
    "all three": uniform(gumbel_noise(noise_keys(range(20), 25)[:, 0], 40).flatten()),
}


@pytest.mark.parametrize("numbers", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_numbers_are_uniform(numbers: np.ndarray) -> None:
    assert numbers.min() > 0 and numbers.max() < 1
    assert scipy.stats.kstest(numbers, "uniform").pvalue > 0.01
    # The lowest of the bits too: equally often in each of 16 parts of a part.
    lowest = (numbers * 2**30 % 16).astype(int)
    assert scipy.stats.chisquare(np.bincount(lowest, minlength=16)).pvalue > 0.01


@pytest.mark.parametrize("numbers", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("lag", [1, 2, 7, 64])
def test_numbers_of_neighbours_are_independent(numbers: np.ndarray, lag: int) -> None:
    counts, _, _ = np.histogram2d(numbers[:-lag], numbers[lag:], bins=8, range=[[0, 1]] * 2)
    assert scipy.stats.chisquare(counts.flatten()).pvalue > 0.001


def test_both_stages_are_independent() -> None:
    keys_B2L = noise_keys(range(200), 64)
    coarse, fine = (uniform(gumbel_noise(keys_B2L[:, s], 1)).flatten() for s in (0, 1))
    counts, _, _ = np.histogram2d(coarse, fine, bins=8, range=[[0, 1]] * 2)
    assert scipy.stats.chisquare(counts.flatten()).pvalue > 0.01


def test_the_largest_of_many_choices_is_any_of_them() -> None:
    """What sampling makes of it: the winner among 64 equal choices, over seeds and positions."""
    winners = gumbel_noise(noise_keys(range(200), 100)[:, 0], 64).argmax(-1).flatten()
    assert scipy.stats.chisquare(winners.bincount(minlength=64).numpy()).pvalue > 0.01
    pairs = winners[:-1] // 8 * 8 + winners[1:] // 8
    assert scipy.stats.chisquare(pairs.bincount(minlength=64).numpy()).pvalue > 0.01
