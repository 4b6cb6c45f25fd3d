"""Worlds of processes: shares, errors, and that a single process communicates nothing.

Several processes are tested in tests/training/test_several_processes.py.
"""

from pathlib import Path

import pytest
import torch

from ctf.common.distributed import ALONE, Vote, World, init_world, launched_size
from ctf.common.errors import UserError
from ctf.common.signals import stop_on_sigterm


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


def test_a_vote_is_answered_at_once_or_on_gpus_a_call_later() -> None:
    conditions = [False, True, False, False, True]
    at_once, later = Vote(ALONE), Vote(ALONE, delayed=True)
    assert [at_once(c) for c in conditions] == conditions
    assert [later(c) for c in conditions] == [False, *conditions[:-1]]


def test_an_error_of_the_first_process_is_raised() -> None:
    def fail() -> None:
        raise UserError("mine")

    with pytest.raises(UserError, match="mine"):
        ALONE.on_main(fail)


def test_only_the_first_process_has_the_message() -> None:
    errors = [World(rank, 3).error("message") for rank in range(3)]
    assert [str(error) for error in errors] == ["message", "", ""]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"RANK": "", "WORLD_SIZE": ""}, 1),
        ({"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "SLURM_PROCID": "3"}, 1),
        (TORCHRUN, 2),
    ],
)
def test_processes_are_those_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], size: int
) -> None:
    set_environment(monkeypatch, environment)
    assert launched_size() == size


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "got RANK=0, but no WORLD_SIZE\nstart several processes with torchrun"),
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE=2, but no RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "got WORLD_SIZE=2, but no MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "got WORLD_SIZE=2, but no MASTER_PORT"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "got WORLD_SIZE=two, expected a whole number"),
        ({**TORCHRUN, "RANK": "2"}, "got RANK=2 of WORLD_SIZE=2, expected less"),
    ],
)
def test_half_of_its_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    set_environment(monkeypatch, environment)
    for call in (
        launched_size,
        lambda: init_world(torch.device("cpu")).__enter__(),
        lambda: stop_on_sigterm(Path("run")).__enter__(),
    ):
        with pytest.raises(UserError, match=message):
            call()


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
