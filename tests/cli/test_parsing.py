"""Mistakes on the command line: the command, what was got, what was expected, in one line."""

import os

import pytest

from ctf.cli.common import commands
from ctf.cli.parsing import parse
from ctf.common.errors import UserError
from ctf.common.version import __version__
from tests.cli.helpers import check_refused
from tests.conftest import Command

FIT = ("fit", "discs", "--out", "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampel"], "unknown command 'sampel': did you mean 'sample'?"),
        (["tokens"], "tokens: expected a command next: extract, check"),
        (["tokens", "--run"], "tokens: expected a command next: extract, check"),
        (["tokens", "extrct"], "unknown command 'tokens extrct': did you mean 'extract'?"),
        (["--device", "cpu"], "got --device, expected a command first: demo, fit, "),
        # the option, and the nearest of this command alone
        (["sample", "x", "--cuont", "3"], "sample: unknown option --cuont: did you mean --count?"),
        (["sample", "x", "--cuont=3"], "sample: unknown option --cuont: did you mean --count?"),
        (["sample", "--tmperature", "3"], "option --tmperature: did you mean --temperature?"),
        (["fit", "discs", "--ouut", "run"], "fit: unknown option --ouut: did you mean --out?"),
        (["fit", "--ouut", "run"], "fit: unknown option --ouut: did you mean --out?"),
        (["sample", "x", "--zzz"], "sample: unknown option --zzz: see ctf sample --help"),
        (["sample", "x", "-c", "3"], "sample: unknown option -c: see ctf sample --help"),
        # values
        (["fit"], "fit: expected IMAGES and --out PATH; see ctf fit --help"),
        (["push", "x"], "push: expected --to STR; see ctf push --help"),
        (["sample", "x", "--count"], "sample: --count: expected a value; see ctf sample --help"),
        (["sample", "x", "--guidance-window", "1"], "--guidance-window: expected 2 values"),
        (["sample", "x", "--count", "1.5"], "--count: got '1.5', expected a whole number"),
        (["sample", "x", "--count="], "sample: --count: got '', expected a whole number"),
        ([*FIT, "--minutes", "abc"], "fit: --minutes: got 'abc', expected a number"),
        (["sample", "x", "--out", ""], "sample: --out: got '', expected a path"),
        (["sample", "x", "--guidance-window", "0", "b"], "--guidance-window: got '0', 'b'"),
        (
            ["sample", "x", "--engine", "fast"],
            "sample: --engine: got 'fast', expected auto, eager, compile, int8, bf16",
        ),
        (
            [*FIT, "--views", "3"],
            "fit: --views: got '3', expected plain, flip, five-crop, ten-crop",
        ),
        # too many
        (["sample", "x", "y"], "sample: got 'y' in addition to all arguments"),
        ([*FIT, "a", "b", "c", "d"], "fit: got 'a' 'b' 'c' ... in addition to all arguments"),
        (["sample", "--dry-run=no"], "--dry-run takes no value: use --dry-run or --no-dry-run"),
    ],
)
def test_mistakes_are_told_in_a_line(
    ctf: Command, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("20", "80", "500"):
        monkeypatch.setenv("COLUMNS", columns)
        error = check_refused(ctf(*arguments), message, lines=1)
        assert len(error) < 200


@pytest.mark.parametrize("command", commands)
def test_an_unknown_option_of_any_command_is_corrected(ctf: Command, command: str) -> None:
    error = check_refused(ctf(*command.split(), "--hlep-me"), lines=1)
    assert error.startswith(f"ctf: {command}: unknown option --hlep-me")


def test_options_can_be_written_with_underscores_and_equals_signs() -> None:
    call = parse(["sample", "x", "--fine_guidance", "3", "--count=4", "--no-dry-run"])
    assert call.keywords["sampling"] == {"fine_guidance": 3.0}  # type: ignore[attr-defined]
    assert call.keywords["count"] == 4  # type: ignore[attr-defined]


def test_help_is_readable_on_a_narrow_terminal(
    ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("1", "20", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = ctf("sample", "--help").out.splitlines()
        assert max(map(len, lines[5:])) <= 60
        assert any("org/name[@revision]" in line for line in lines)


def test_the_version_is_printed(ctf: Command) -> None:
    assert ctf("--version").out == f"ctf {__version__}\n"


def test_parsing_leaves_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(UserError):
        parse(["sample", "--nothing"])
    parse(["sample", "x"])
    assert "COLUMNS" not in os.environ
