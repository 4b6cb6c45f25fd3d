"""Teams of threads: what parts there are, in which order and modes, and how errors end them."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctf.common import threads

THREADS = 3


pytestmark = pytest.mark.usefixtures("three_threads")


@given(count=st.integers(1, 50), smallest=st.integers(1, 10))
def test_parts_are_about_equal_and_cover_all(count: int, smallest: int) -> None:
    with threads.team():
        parts = threads.parts(count, smallest)
    items = list(range(count))
    sizes = [len(items[part]) for part in parts]
    assert [item for part in parts for item in items[part]] == items
    assert len(parts) == max(1, min(THREADS, count // smallest))
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == 1 or min(sizes) >= smallest


def test_each_part_has_a_thread_and_results_are_in_order() -> None:
    together = threading.Barrier(THREADS, timeout=60)  # passed only if all parts run at once

    def compute(numbers: list[int], tensor: torch.Tensor) -> tuple[list[int], int, int]:
        together.wait()
        return numbers, threading.get_ident(), len(tensor)

    with threads.team():
        results = threads.over_parts(compute, [*range(10)], torch.zeros(10))
    assert [numbers for numbers, *_ in results] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert [length for *_, length in results] == [3, 3, 4]
    assert len({thread for _, thread, _ in results}) == THREADS
    assert results[0][1] == threading.get_ident()


def test_in_a_team_operators_take_one_thread_and_afterwards_as_many_as_before() -> None:
    with threads.team():
        assert threads.over_parts(lambda _: torch.get_num_threads(), [*range(9)]) == [1, 1, 1]
        with threads.team():  # that of the block around it
            assert torch.get_num_threads() == 1
            assert len(threads.parts(9)) == THREADS
        assert len(threads.parts(9)) == THREADS
    assert torch.get_num_threads() == THREADS
    assert len(threads.parts(9)) == 1
    with threads.team(False):
        assert torch.get_num_threads() == THREADS
        assert len(threads.parts(9)) == 1


def test_with_one_thread_there_is_one_part() -> None:
    torch.set_num_threads(1)
    with threads.team():
        assert threads.parts(9) == [slice(0, 9)]
    assert torch.get_num_threads() == 1


def test_there_are_no_parts_of_a_part() -> None:
    def compute(_: list[int]) -> int:
        with threads.team():
            return len(threads.parts(9))

    with threads.team():
        assert threads.over_parts(compute, [*range(9)]) == [1, 1, 1]
        assert len(threads.parts(9)) == THREADS


def test_teams_of_two_threads_do_not_take_each_others_number() -> None:
    sizes: list[int] = []

    def other() -> None:
        with threads.team():
            sizes.append(len(threads.parts(9)))
        sizes.append(torch.get_num_threads())

    with threads.team():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert sizes == [THREADS, THREADS]
    assert torch.get_num_threads() == THREADS


def test_parts_compute_in_the_modes_of_the_caller() -> None:
    def modes(_: list[int]) -> tuple[bool, bool, bool, torch.dtype]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            product.is_inference(),
            product.dtype,
        )

    items = [*range(9)]
    with threads.team():
        assert set(threads.over_parts(modes, items)) == {(True, False, False, torch.float32)}
        with torch.no_grad():
            assert set(threads.over_parts(modes, items)) == {(False, False, False, torch.float32)}
        with torch.inference_mode():
            assert set(threads.over_parts(modes, items)) == {(False, True, True, torch.float32)}
        with torch.autocast("cpu", torch.bfloat16):
            assert set(threads.over_parts(modes, items)) == {(True, False, False, torch.bfloat16)}


@pytest.mark.parametrize("failing", [[0], [2], [0, 1, 2], [1, 2]])
def test_an_error_in_a_part_is_raised_when_all_parts_have_ended(failing: list[int]) -> None:
    ended: list[int] = []

    def compute(numbers: list[int]) -> int:
        try:
            if numbers[0] in failing:
                raise ValueError(numbers[0])
            return numbers[0]
        finally:
            ended.append(numbers[0])

    with threads.team():
        with pytest.raises(ValueError) as caught:
            threads.over_parts(compute, [0, 1, 2])
        assert caught.value.args == (failing[0],)
        assert sorted(ended) == [0, 1, 2]
        assert threads.over_parts(lambda numbers: numbers[0], [0, 1, 2]) == [0, 1, 2]
    assert torch.get_num_threads() == THREADS


def test_ctrl_c_waits_for_the_other_parts() -> None:
    interrupted = threading.Event()
    ended: list[int] = []

    def compute(numbers: list[int]) -> None:
        if numbers == [0]:
            interrupted.set()
            raise KeyboardInterrupt  # as Python raises it in the main thread
        assert interrupted.wait(60)
        ended.append(numbers[0])

    with pytest.raises(KeyboardInterrupt), threads.team():
        threads.over_parts(compute, [0, 1, 2])
    assert sorted(ended) == [1, 2]
    assert torch.get_num_threads() == THREADS
