"""What SIGTERM does to a command."""

import signal
from pathlib import Path

import pytest

from ctf.common.errors import Stopped
from ctf.common.signals import stop_on_sigterm


def interrupted_library(number: signal.Signals) -> None:
    """Be interrupted while it calls Python, and tell that as an error of its own."""
    try:
        signal.raise_signal(number)
    except BaseException:  # as compiled code that calls Python does
        raise ValueError("could not determine the shape") from None


def test_an_error_of_an_interrupted_library_is_a_stop(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="run it again"), stop_on_sigterm(tmp_path):
        interrupted_library(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stop"), stop_on_sigterm(tmp_path):
        raise ValueError("no stop")
