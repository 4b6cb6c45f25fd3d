"""The program: help, errors of parsing, exit codes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctf.cli import main as cli
from ctf.cli.common import GROUPS
from ctf.evaluation.classifier import ClassifierConfig
from ctf.pipelines import export
from tests.cli.helpers import check_refused
from tests.conftest import Command

COMMANDS = (
    "demo", "fit", "cost", "sample", "evaluate", "studio", "push", "reproduce", "tokenizer train",
    "tokenizer evaluate", "tokens extract", "tokens check", "clusters fit", "clusters show",
    "train coarse", "train fine", "train baseline", "runs show", "runs tensorboard",
    "classifier train", "convert llamagen", "bench sample", "bench train", "bench tokens",
    "bench quality", "bench fit",
)  # fmt: skip
WITHOUT_DRY_RUN = (
    "cost", "studio", "tokenizer evaluate", "tokens check", "clusters show", "bench tokens",
    "bench quality",
)  # fmt: skip


def example(ctf: Command, command: str) -> str:
    help_text = ctf(*command.split(), "--help").out
    return next(line for line in help_text.splitlines() if line.startswith("Example: "))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_a_dry_run(ctf: Command, command: str) -> None:
    result = ctf(*command.split(), "--help")
    assert result.code == 0 and result.err == ""
    assert example(ctf, command).startswith(f"Example: ctf {command}")
    assert ("--dry-run" in result.out) == (command not in WITHOUT_DRY_RUN)
    assert "None" not in result.out and "(default: )" not in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_only_lack_their_files(
    ctf: Command, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = example(ctf, command).removeprefix("Example: ctf ").split()
    if command == "cost":  # needs no files
        assert ctf(*arguments).code == 0
    elif command in ("demo", "reproduce") or "bench" in command or "fashion-mnist" in arguments:
        arguments += ["--device", "mps"]  # refused before the work begins
        check_refused(ctf(*arguments), "device mps: not available on this machine")
    else:
        error = check_refused(ctf(*arguments))
        assert any(words in error for words in ("no such folder", "not found", "no pipeline"))
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_commands_describes_groups(
    ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for arguments in (["--help"], []):
        result = ctf(*arguments)
        assert result.code == 0
        for command in COMMANDS:
            assert f"• {command.split()[0]} " in result.out
        for description in GROUPS.values():
            assert description in result.out
    for group, description in GROUPS.items():
        result = ctf(group, "--help")
        assert result.code == 0 and description in result.out


def test_numbers_in_help_are_those_of_the_code(ctf: Command) -> None:
    steps = re.search(r"training steps; by default (\d+)", ctf("classifier", "train", "--help").out)
    assert steps and int(steps[1]) == ClassifierConfig().steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "fit"),
        (["fit"], "--out"),
        (["fit", "fashion-mnist"], "--out"),
        (["fit", "fashion-mnist", "--out", "x", "--stepz", "3"], "--stepz"),
        (["fit", "fashion-mnist", "--out", "x", "--steps", "many"], "many"),
        (["fit", "fashion-mnist", "--out", "x", "--device", "tpu"], "tpu"),
        (["fit", "fashion-mnist", "--out", "x", "--views", "sideways"], "sideways"),
        (["train", "corse", "x"], "coarse"),
        (["clusters", "fit", "x", "--method", "linkage"], "linkage"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    ctf: Command, arguments: list[str], message: str
) -> None:
    check_refused(ctf(*arguments), message, lines=1)


def test_the_program_exits_with_0_or_2(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ctf", *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    shown = program("fit", "--help")
    assert shown.returncode == 0 and "Example: ctf fit" in shown.stdout and shown.stderr == ""
    wrong = program("fit", "nowhere", "--out", "run")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("ctf: nowhere: no such folder")
    assert len(wrong.stderr.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_exits_with_130(
    ctf: Command, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write", interrupt)
    result = ctf("sample", run)
    assert result.code == 130 and result.err == (
        "ctf: interrupted; what is finished is kept, run the same command again\n"
    )


def test_no_home_directory_is_needed(run: Path, tmp_path: Path) -> None:
    code = (
        "import pwd, sys\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
        "from ctf.cli.main import main\n"
        "run = sys.argv[1]\n"
        "assert main(['sample', run, '--count', '1']) == 0\n"
        "assert main(['runs', 'show', run]) == 0\n"
        "assert main(['sample', 'me/nothing']) == 2\n"
    )
    names = (
        "HOME",
        "USER",
        "LOGNAME",
        "LNAME",
        "USERNAME",
        "CTF_CACHE",
        "XDG_CACHE_HOME",
        "HF_HOME",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["PYTHONPATH"] = str(Path(cli.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code, run],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.png", "curves.png"}
    assert "set HF_HOME to a folder" in result.stderr or "HF_HUB_OFFLINE" in result.stderr


def test_parsing_does_not_import_torch() -> None:
    code = (
        "import sys, ctf.cli.main as m; m.main(['fit', '--help']); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
