"""Defaults of PyTorch that a caller has set: they do not reach us, and are there afterwards."""

from collections.abc import Generator, Iterator

import pytest
import torch

from ctf.common.defaults import steps_with_torch_defaults, torch_defaults, with_torch_defaults


@pytest.fixture(params=["meta", "float64", "both"])
def changed(request: pytest.FixtureRequest) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Other defaults than PyTorch's own."""
    if request.param != "float64":
        torch.set_default_device("meta")
    if request.param != "meta":
        torch.set_default_dtype(torch.float64)
    try:
        yield current()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def current() -> tuple[torch.device, torch.dtype]:
    made = torch.zeros(1)
    return made.device, made.dtype


OURS = (torch.device("cpu"), torch.float32)


def test_a_block_and_a_function_have_our_defaults(
    changed: tuple[torch.device, torch.dtype],
) -> None:
    with torch_defaults():
        assert current() == OURS
        with torch_defaults():
            assert current() == OURS
    assert with_torch_defaults(current)() == OURS
    with pytest.raises(ZeroDivisionError):
        with_torch_defaults(lambda: 1 / 0)()
    assert current() == changed != OURS


def test_steps_have_our_defaults_and_the_loop_has_its_own(
    changed: tuple[torch.device, torch.dtype],
) -> None:
    closed = []

    def steps() -> Generator[tuple[torch.device, torch.dtype], None, None]:
        try:
            yield current()
            yield current()
        finally:
            closed.append(True)

    seen = 0
    for step in steps_with_torch_defaults(steps()):
        assert step == OURS and current() == changed
        seen += 1
    assert seen == 2
    for _ in steps_with_torch_defaults(steps()):
        break
    assert closed == [True, True] and current() == changed
