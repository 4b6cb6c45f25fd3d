"""What a user sees of long work: a bar on a terminal, plain lines in a pipe or a file."""

import io

import pytest
from rich.console import Console

from ctf.common.progress import LINE_SECONDS, format_duration, show_progress


class Clock:
    """A clock that moves only when `now` is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, width=40)  # narrow: a line is not to be broken


def test_plain_lines_now_and_then() -> None:
    clock, (file, console) = Clock(), plain()
    with show_progress("coarse", console, clock) as progress:
        # Resumed at step 1000: 2 seconds a step.
        for step in range(1020, 1201, 20):
            loss = {"loss": 4.0 - step / 1000, "gradient_norm": 1.0, "tokens_per_second": 4096.0}
            progress(step, 5000, loss)
            clock.now += 40
        progress(5000, 5000, {"loss": 1.5})
    lines = file.getvalue().splitlines()
    assert lines[0] == "coarse: 1020/5000, loss 2.9800, 4,096 tokens/s"
    assert lines[1] == "coarse: 1040/5000, loss 2.9600, 4,096 tokens/s, 2 h 12 min left"
    assert len(lines) == 11 and lines[-1] == "coarse: 5000/5000, loss 1.5000"


def test_not_too_many_lines() -> None:
    clock, (file, console) = Clock(), plain()
    with show_progress("tokens", console, clock) as progress:
        for done in range(1, 1001):
            progress(done, 1000)
            clock.now += 0.1
    lines = file.getvalue().splitlines()
    assert lines[0] == "tokens: 1/1000" and lines[-1] == "tokens: 1000/1000"
    assert len(lines) == 2 + int(100 / LINE_SECONDS)
    assert lines[1] == "tokens: 151/1000, 1 min 25 s left"


def test_a_bar_on_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with show_progress("tokenizer", console) as progress:
        progress(20, 100, {"loss": 0.25, "images_per_second": 81.0})
    output = file.getvalue()
    assert "tokenizer" in output and "20/100" in output and "loss 0.2500, 81 images/s" in output


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (59.4, "59 s"), (90, "1 min 30 s"), (7260, "2 h 1 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected
