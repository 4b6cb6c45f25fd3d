"""From the words of a command line to the call to make; mistakes are told in a line.

The command is found here, and its options are parsed by tyro, whose errors are boxes of up to a
screenful: they are reduced to what was got and what was expected.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence

import tyro

from ctf.cli.common import GROUPS, app, commands, groups
from ctf.cli.options import registry
from ctf.common.config import closest, did_you_mean, list_names
from ctf.common.errors import UserError
from ctf.common.version import __version__

DESCRIPTION = "Coarse-to-fine token prediction: train image generators and sample from them."
NARROWEST = 60  # columns of a help text, on a terminal of fewer

for _name, _group in groups.items():
    app.command(_group, name=_name, help=GROUPS[_name])


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Return the call that a command line asks for.

    Raises:
        UserError: An unknown command or option, a missing or an unusable value.
        SystemExit: After printing a help text.
    """
    words = list(arguments) or ["--help"]
    if words == ["--version"]:
        print(f"ctf {__version__}")
        raise SystemExit(0)
    if words[0].startswith(("-h", "--help", "--tyro-")) or (
        words[0] in groups and words[1:2] in (["-h"], ["--help"])
    ):
        with _columns(max(NARROWEST, shutil.get_terminal_size().columns)):
            app.cli(prog="ctf", args=words, description=DESCRIPTION, registry=registry)
    command, rest = _find_command(words)
    asks_help = {"-h", "--help"} & set(rest)
    with _columns(max(NARROWEST, shutil.get_terminal_size().columns) if asks_help else 10_000):
        call, unknown = _parse_options(command, rest)
        _check_flags(command, rest)
    if unknown:
        raise UserError(_unknown(command, unknown))
    return call


def _find_command(words: list[str]) -> tuple[str, list[str]]:
    """Split a command line into the name of the command, of one or two words, and the rest."""
    first, *rest = words
    if first in commands:
        return first, rest
    if first not in groups:
        if first.startswith("-"):
            raise UserError(f"got {first}, expected a command first: {', '.join(_names())}")
        raise UserError(f"unknown command {first!r}{did_you_mean(first, _names())}")
    inner = [name.partition(" ")[2] for name in commands if name.startswith(f"{first} ")]
    if not rest or rest[0].startswith("-"):
        raise UserError(f"{first}: expected a command next: {', '.join(inner)}")
    if rest[0] not in inner:
        raise UserError(f"unknown command '{first} {rest[0]}'{did_you_mean(rest[0], inner)}")
    return f"{first} {rest[0]}", rest[1:]


def _names() -> list[str]:
    """Return all words that a command line can begin with, in the order of the help text."""
    return list(dict.fromkeys(name.partition(" ")[0] for name in commands))


def _parse_options(command: str, words: list[str]) -> tuple[Callable[[], None], list[str]]:
    """Return the call to make, and the words that are no arguments of the command."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            call, unknown = tyro.cli(
                commands[command],
                prog=f"ctf {command}",
                args=words,
                registry=registry,
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        unknown = _unknown_options(command, words)
        message = _unknown(command, unknown) if unknown else _message(command, box.getvalue())
        raise UserError(message) from None
    return call, unknown


def _check_flags(command: str, words: list[str]) -> None:
    """Refuse --flag=value, which tyro takes for the flag and a positional argument."""
    for name in (word.partition("=")[0] for word in words if re.match(r"--[\w-]+=", word)):
        negated = f"--no-{name.removeprefix('--')}"
        if negated in _options(command):
            raise UserError(f"{command}: {name} takes no value: use {name} or {negated}")


def _unknown_options(command: str, words: list[str]) -> list[str]:
    """Return the words that are written as options, but are none of the command."""
    known = _options(command)
    names = [word.partition("=")[0] for word in words if re.match(r"--[^\W\d]", word)]
    return [name for name in names if name.replace("_", "-") not in known]


def _unknown(command: str, words: list[str]) -> str:
    """Return the message for words that are no arguments of a command."""
    options = [word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)]
    if not options:
        got = " ".join(map(repr, words[:3])) + " ..." * (len(words) > 3)
        return f"{command}: got {got} in addition to all arguments; see ctf {command} --help"
    close = closest(options[0], _options(command))
    hint = f"did you mean {close}?" if close else f"see ctf {command} --help"
    return f"{command}: unknown option {options[0]}: {hint}"


def _options(command: str) -> list[str]:
    """Return the options of a command, as its help lists them."""
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        tyro.cli(commands[command], prog="ctf", args=["--help"], registry=registry)
    lines = re.findall(r"^[│| ]+(-.*?)(?:  .*)?$", help_text.getvalue(), re.MULTILINE)
    return [option for line in lines for option in re.findall(r"(?<!\S)--[\w-]+", line)]


def _message(command: str, box: str) -> str:
    """Return the message of tyro's box around an error."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    _, *rows = [row[2:].rstrip(" │╮╯") for row in plain.splitlines()]
    texts = [row for row in rows if row.strip(" -─") and not row.startswith("For full helptext")]
    if texts and texts[0].startswith("Missing from"):
        missing = [text.strip() for text in texts if re.match(r" {4}\S", text)]
        return f"{command}: expected {' and '.join(missing[:-1])}; see ctf {command} --help"
    text = texts[0] if texts else plain.strip()
    if match := re.match(r"Missing value for argument '(.+)'\. Expected (\d+)", text):
        values = "a value" if match[2] == "1" else f"{match[2]} values"
        return f"{command}: {_shown(match[1])}: expected {values}; see ctf {command} --help"
    if match := re.match(r"invalid choice '(.*)' for argument '(.+?)'.*?\((.*)\)", text):
        choices = [name for name in re.findall(r"'([^']*)'", match[3]) if name != "None"]
        return f"{command}: {_shown(match[2])}: got {match[1]!r}, expected {list_names(choices)}"
    text = re.sub(
        r"Could not parse arguments \[(.*)\] into .*", r"got \1, expected other values", text
    )
    return f"{command}: {text.removeprefix('Error parsing ')[:300]}; see ctf {command} --help"


def _shown(argument: str) -> str:
    """Return an argument as its help shows it: a positional one in capital letters."""
    return argument if argument.startswith("-") else argument.upper()


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    """Make texts as wide as this: tyro asks the environment, and breaks words on narrow ones."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
