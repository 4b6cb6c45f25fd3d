"""Batches read ahead are those read when needed, and errors of the thread are raised."""

import threading

import numpy as np
import pytest
import torch

from ctf.common.errors import UserError
from ctf.training.batches import AHEAD, Batch, Batches

CPU = torch.device("cpu")


def read(step: int) -> Batch:
    return np.arange(step, step + 2), [torch.tensor([step, step + 1]), torch.ones(1) / (step + 1)]


@pytest.mark.parametrize("ahead", [0, 1, AHEAD, 7])
@pytest.mark.parametrize("order", [range(6), [3, 4, 5], [0, 1, 4, 5, 2, 3], [5, 6, 7, 8]])
def test_batches_depend_on_their_step_alone(ahead: int, order: list[int]) -> None:
    batches = Batches(read, 6, CPU, ahead)
    for step in order:  # resumed, run again, and beyond the end, too
        (images_B, tensors), (expected_B, expected) = batches(step), read(step)
        assert images_B.tolist() == expected_B.tolist()
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_by_default_a_processor_reads_when_it_needs_to() -> None:
    steps: list[int] = []

    def noting(step: int) -> Batch:
        assert threading.current_thread() is threading.main_thread()
        steps.append(step)
        return read(step)

    batches = Batches(noting, 10, CPU)
    for step in range(3):
        batches(step)
        assert steps == [*range(step + 1)]


def test_another_thread_reads_ahead_but_not_beyond_the_end() -> None:
    done = {step: threading.Event() for step in range(5)}

    def noting(step: int) -> Batch:
        assert threading.current_thread() is not threading.main_thread()
        done[step].set()  # a KeyError if there is no such step
        return read(step)

    batches = Batches(noting, 5, CPU, 2)
    batches(0)
    assert done[2].wait(10) and not done[3].is_set()
    for step in range(1, 5):
        batches(step)
    assert all(event.is_set() for event in done.values())


def test_an_error_is_raised_at_its_step() -> None:
    def failing(step: int) -> Batch:
        if step == 2:
            raise UserError("shard 7: damaged")
        return read(step)

    batches = Batches(failing, 5, CPU, 2)
    batches(0)
    batches(1)
    with pytest.raises(UserError, match="shard 7"):
        batches(2)
