"""The choice of a window, with costs of passes and shares of right guesses that are given."""

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest

from ctf.models.parallel import CoarseSampler
from ctf.pipelines import windows
from ctf.pipelines.windows import AutoWindow

SIZES = (1, 2, 4, 8, 16, 32, 64)
LENGTH, IMAGES = 64, 20
FEW_ROWS = 256

Cost = Callable[[int], float]  # seconds of a pass, by its rows
Share = Callable[[int], float]  # of guesses that are right, by the number of guesses before


def take(
    left: list[int], window: int, chance: random.Random, share: Share
) -> list[tuple[int, int]]:
    """Take the labels of a pass from what each image has left; guesses, and how many are right."""
    guesses = []
    for image, labels in enumerate(left):
        if labels:
            guessed, right = min(window, labels) - 1, 0
            while right < guessed and chance.random() < share(right):
                right += 1
            guesses.append((guessed, right))
            left[image] -= right + 1
    return guesses


def passes(
    choose: Callable[[int, int], int], cost: Cost, share: Share, *, images: int = IMAGES,
    batch: int = 1, auto: AutoWindow | None = None, seed: int = 0,
) -> list[tuple[int, float]]:  # fmt: skip
    """Windows and seconds of the passes for images, one batch after another."""
    chance, taken = random.Random(seed), []
    for _ in range(images):
        left = [LENGTH] * batch
        while any(left):
            window = choose(batch, max(left))
            guesses = take(left, window, chance, share)
            taken.append((window, cost(batch * window)))
            if auto is not None:
                auto.record(batch * window, taken[-1][1], guesses)
    return taken


def seconds(taken: list[tuple[int, float]]) -> float:
    return sum(each for _, each in taken)


def fixed(window: int, cost: Cost, share: Share, batch: int = 1) -> float:
    return seconds(passes(lambda *_: window, cost, share, batch=batch))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "cost", [lambda r: r, lambda r: 1 + 0.1 * r, lambda r: 1 + r / 50, lambda r: r**2]
)
def test_without_right_guesses_it_is_at_most_three_percent_slower_than_one_by_one(
    cost: Cost, batch: int
) -> None:
    auto = AutoWindow(SIZES, LENGTH, FEW_ROWS)
    chosen = seconds(passes(auto.next, cost, lambda _: 0.0, batch=batch, auto=auto))
    assert chosen < 1.03 * fixed(1, cost, lambda _: 0.0, batch)


FALLING: Share = lambda before: 0.75 if before < 4 else 0.4  # noqa: E731


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "cost", [lambda r: 1, lambda r: 1 + 0.05 * r, lambda r: 1 + r / 4, lambda r: 4 + max(r, 16)]
)
@pytest.mark.parametrize("share", [lambda _: 0.6, lambda _: 0.9, FALLING])
def test_the_fastest_window_is_found(cost: Cost, share: Share, batch: int) -> None:
    auto = AutoWindow(SIZES, LENGTH, FEW_ROWS)
    chosen = seconds(passes(auto.next, cost, share, batch=batch, auto=auto))
    assert chosen < 1.1 * min(fixed(size, cost, share, batch) for size in SIZES)


@pytest.mark.parametrize("cost", [lambda r: 1 + 0.01 * r, lambda r: 4 + max(r, 8)])
def test_it_is_found_within_the_first_image(cost: Cost) -> None:
    """Which takes at most a quarter longer than all later ones."""
    first, later = [], []
    for seed in range(10):
        auto = AutoWindow(SIZES, LENGTH, FEW_ROWS)
        options = {"auto": auto, "images": 1}
        first.append(seconds(passes(auto.next, cost, FALLING, seed=seed, **options)))  # type: ignore[arg-type]
        for other in range(5):
            each = passes(auto.next, cost, FALLING, seed=100 * seed + other, **options)  # type: ignore[arg-type]
            later.append(seconds(each) / 5)
    assert sum(first) < 1.25 * sum(later)


def test_what_was_learnt_in_large_batches_serves_single_images() -> None:
    def cost(rows: int) -> float:
        return 1 + 0.05 * rows

    auto = AutoWindow(SIZES, LENGTH, FEW_ROWS)
    passes(auto.next, cost, FALLING, batch=16, images=2, auto=auto)
    taken = passes(auto.next, cost, FALLING, images=3, auto=auto)
    assert seconds(taken) < 1.15 * min(fixed(size, cost, FALLING) for size in SIZES) * 3 / IMAGES


@pytest.mark.parametrize("share", [lambda _: 0.0, lambda _: 0.5, FALLING])
def test_batches_whose_images_are_faster_together_stay_so(share: Share) -> None:
    """One label a pass keeps them together; with larger windows each image is at its own place."""
    auto, chance = AutoWindow(SIZES, LENGTH, windows.FEW_ROWS), random.Random(0)
    total = one_by_one = 0.0
    for _ in range(IMAGES):
        left = [LENGTH] * 8
        one_by_one += LENGTH * (1 + 0.1 * 8)
        while any(left):
            at = [labels for labels in left if labels]
            together = len(at) > 1 and len({*at}) == 1
            window = auto.next(8, max(left), together=together)
            cost = (1 if together and window == 1 else 1.5) + 0.1 * 8 * window
            guesses = take(left, window, chance, share)
            auto.record(8 * window, cost, guesses, together=together and window == 1)
            total += cost
    assert total < 1.03 * one_by_one


@pytest.mark.parametrize("batch", [8, 16])
def test_the_first_batch_hardly_pays_for_what_larger_windows_are_found_to_cost(batch: int) -> None:
    """Costs as measured on a processor: 1, 1.45, 1.95, 2.6, 4.6 for 16, 32, 64, 128, 256 rows."""
    measured = [(2, 0.55), (4, 0.65), (8, 0.8), (16, 1), (32, 1.45), (64, 1.95), (128, 2.6)]
    rows, costs = zip(*measured, (256, 4.6), (4096, 74), strict=True)
    total = one_by_one = 0.0
    for seed in range(10):
        auto, chance = AutoWindow(SIZES, LENGTH, windows.FEW_ROWS), random.Random(seed)
        left = [LENGTH] * batch
        one_by_one += LENGTH * 0.93 * float(np.interp(2 * batch, rows, costs))
        while any(left):
            at = [labels for labels in left if labels]
            together = len(at) > 1 and len({*at}) == 1
            window = auto.next(2 * len(at), max(left), together=together)
            together = together and window == 1
            cost = float(np.interp(2 * len(at) * window, rows, costs)) * (0.93 if together else 1)
            guesses = take(left, window, chance, lambda before: 0.65 if before < 2 else 0.5)
            auto.record(2 * len(at) * window, cost, guesses, together=together)
            total += cost
    assert total < 1.03 * one_by_one


def test_a_window_that_was_slow_by_chance_is_found_later() -> None:
    auto, used = AutoWindow((1, 4), LENGTH, FEW_ROWS), []
    for number in range(200):
        window = auto.next(2, LENGTH)
        used.append(window)
        slow = 10.0 if number < 8 and window == 4 else 1.0
        auto.record(2 * window, slow, [(3, 1)] if window == 4 else [(0, 0)])
    assert used[:4] == [1, 1, 4, 4] and used[6] == 1
    assert used[-50:].count(4) > 45


def test_a_window_that_becomes_slow_is_left() -> None:
    auto, used = AutoWindow(SIZES, LENGTH, FEW_ROWS), []
    for number in range(200):
        used.append(auto.next(1, LENGTH))
        seconds = 1.0 if number < 60 else float(used[-1])
        auto.record(used[-1], seconds, [(used[-1] - 1, min(used[-1] - 1, 2))])
    assert used[50] >= 4 and used[-1] == 1


@pytest.mark.parametrize("sizes", [(1,), (1, 4, 16), SIZES])
def test_only_given_sizes_are_used_and_none_that_reaches_further_than_needed(
    sizes: tuple[int, ...],
) -> None:
    auto, chance = AutoWindow(sizes, LENGTH, FEW_ROWS), random.Random(0)
    for _ in range(500):
        left = chance.randint(1, LENGTH)
        window = auto.next(1, left)
        assert window in sizes
        smaller = [size for size in sizes if size < window]
        assert not smaller or smaller[-1] < left
        auto.record(window, 1.0, [(window - 1, window - 1)])


class Countdown:
    """Stands for a sampler of one image that has other rows in each pass."""

    length = LENGTH

    def __init__(self, seed: int) -> None:
        self.chance, self.certain = random.Random(seed), [0]

    @property
    def rows(self) -> int:
        return self.chance.randrange(1, 10_000)

    def advance(self, window: int) -> list[int]:
        self.certain = [min(self.certain[0] + 1, LENGTH)]
        return [1]


@pytest.fixture
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_take_turns_often")
def test_several_threads_may_use_it_at_once() -> None:
    auto = AutoWindow(SIZES, LENGTH, FEW_ROWS)

    def sample(seed: int) -> list[int]:
        sampler: Any = Countdown(seed)
        while sampler.certain[0] < LENGTH:
            windows.advance(cast(CoarseSampler, sampler), auto)
        return cast(list[int], sampler.certain)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sample, range(12))) == [[LENGTH]] * 12
