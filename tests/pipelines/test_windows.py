"""The choice of a window, with costs of passes and numbers of labels that are given."""

from collections.abc import Callable, Sequence

import pytest

from ctf.pipelines.windows import AutoWindow

SIZES = (1, 2, 4, 8, 16, 32, 64)
LENGTH, IMAGES = 64, 20


def seconds(
    next_window: Callable[[], int], cost: Callable[[int], float], labels: Callable[[int], float],
    auto: AutoWindow | None = None,
) -> float:  # fmt: skip
    """How long images take, one after another."""
    total = 0.0
    for _ in range(IMAGES):
        certain = 0.0
        while certain < LENGTH:
            window = next_window()
            total += cost(window)
            certain += labels(window)
            if auto is not None:
                auto.record(window, cost(window), labels(window))
    return total


def chosen(cost: Callable[[int], float], labels: Callable[[int], float]) -> float:
    auto = AutoWindow(SIZES)
    return seconds(auto.next, cost, labels, auto)


@pytest.mark.parametrize("cost", [lambda w: w, lambda w: 1 + 0.1 * w, lambda w: w**2])
def test_without_right_guesses_it_is_at_most_three_percent_slower_than_one_by_one(
    cost: Callable[[int], float],
) -> None:
    def none(window: int) -> float:
        return 1.0

    assert chosen(cost, none) < 1.03 * seconds(lambda: 1, cost, none)


@pytest.mark.parametrize("cost", [lambda w: 1, lambda w: 1 + 0.05 * w, lambda w: 1 + w / 4])
def test_the_fastest_window_is_found(cost: Callable[[int], float]) -> None:
    def labels(window: int) -> float:
        return min(window, 1 + 2.5 * (1 - 2 ** (1 - window)))

    def fixed(size: int) -> float:
        return seconds(lambda: size, cost, labels)

    assert chosen(cost, labels) < 1.05 * min(map(fixed, SIZES))


def test_a_window_that_was_slow_by_chance_is_found_later() -> None:
    auto, used = AutoWindow((1, 4)), []
    for number in range(200):
        window = auto.next()
        used.append(window)
        slow = 10.0 if number < 8 and window == 4 else 1.0
        auto.record(window, slow, 2.0 if window == 4 else 1.0)
    assert used[:4] == [1, 1, 4, 4] and used[6] == 1
    assert used[-50:].count(4) > 45


def test_a_window_that_becomes_slow_is_left() -> None:
    auto, used = AutoWindow(SIZES), []
    for number in range(200):
        used.append(auto.next())
        auto.record(used[-1], 1.0 if number < 60 else float(used[-1]), 1 + min(used[-1], 8) / 4)
    assert used[50] >= 8 and used[-1] == 1


def test_only_given_sizes_are_used() -> None:
    def windows(sizes: Sequence[int]) -> set[int]:
        auto, used = AutoWindow(sizes), set()
        for _ in range(300):
            used.add(auto.next())
            auto.record(max(used), 1.0, 1.0)
        return used

    assert windows((1,)) == {1}
    assert windows((1, 4, 16)) <= {1, 4, 16}
