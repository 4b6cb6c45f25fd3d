"""Worlds of processes: shares, errors, and that a single process communicates nothing.

Several processes are tested in tests/training/test_several_processes.py.
"""

import pytest
import torch

from ctf.common.distributed import ALONE, World, init_world
from ctf.common.errors import UserError


def test_shares_are_equal_and_cover_all() -> None:
    parts = [World(rank, 3).share(12, "batch_size") for rank in range(3)]
    assert [i for part in parts for i in range(12)[part]] == [*range(12)]
    with pytest.raises(UserError, match="batch_size: got 10, expected a multiple of the 3"):
        World(0, 3).share(10, "batch_size")


def test_a_single_process_communicates_nothing() -> None:
    with init_world(torch.device("cpu")) as world:
        assert world == ALONE and world.is_main and not torch.distributed.is_initialized()
        assert world.broadcast(7) == 7 and float(world.sum(torch.tensor(2.5))) == 2.5
        assert float(world.mean(torch.tensor(2.5))) == 2.5
        assert world.any(True) and not world.any(False)
        assert world.gather(torch.ones(2, 3)).shape == (2, 3)


def test_an_error_of_the_first_process_is_raised() -> None:
    def fail() -> None:
        raise UserError("mine")

    with pytest.raises(UserError, match="mine"):
        ALONE.on_main(fail)


def test_only_the_first_process_has_the_message() -> None:
    errors = [World(rank, 3).error("message") for rank in range(3)]
    assert [str(error) for error in errors] == ["message", "", ""]
