"""What the tests of commands share."""

from pathlib import Path
from typing import Any

from tests.conftest import Command, Result, recipe_options

LLAMAGEN = Path(__file__).parents[1] / "fixtures" / "llamagen"


def check_refused(result: Result, *messages: str, lines: int = 2) -> str:
    """Check the exit code and the error of a user's mistake; return the error."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    error = result.err[result.err.index("ctf: ") :]  # after lines of progress
    assert len(error.splitlines()) <= lines, error
    for message in messages:
        assert message in error
    return error


def fit_tiny(ctf: Command, images: Path | str, out: Path, *more: Any) -> Result:
    return ctf(
        "fit", images, "--out", out, "--preset", "tiny", "--steps", 1, *more, *recipe_options()
    )
