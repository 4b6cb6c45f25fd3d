"""The standard streams: closed, without a reader, or of another encoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctf.cli import main as cli
from tests.conftest import Command

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
SHOW = "from ctf.cli import streams, common; streams.prepare(); "


def run_python(code: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = f'"$0" -c "$1" {shell}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, code],
        env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fit", "--help"], ["--version"], ["cost", "tiny"]]
)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "ctf", *arguments],
            env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_work_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    code = SHOW + "common.show('x' * 100_000); common.show('y'); open('written', 'w').write('z')"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        subprocess.run(
            [sys.executable, "-c", code],
            env=ENVIRONMENT, cwd=tmp_path, stdout=writer, stderr=writer, check=True,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (tmp_path / "written").read_text() == "z"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_taken_by_other_files(tmp_path: Path, closed: str) -> None:
    path = tmp_path / "file"
    code = (
        SHOW + f"file = open({str(path)!r}, 'w'); print('to nobody'); common.show('to nobody'); "
        "import sys; print('to nobody', file=sys.stderr); sys.stdin.read(0); "
        "file.write('content'); raise SystemExit(file.fileno())"
    )
    result = run_python(code, closed)
    assert result.returncode > 2
    assert path.read_text() == "content"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_names_are_printed_in_every_encoding(environment: dict[str, str]) -> None:
    code = (
        SHOW + r"common.show('\u72ac'); print('\udcff\u72ac'); "
        r"common.print_table(['\u72ac'], [['\u72ac \u2022']])"
    )
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\u72ac\n\\udcff\\u72ac\n")


@pytest.mark.parametrize("variable", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "20"}])
def test_help_is_plain_text_on_every_terminal(variable: dict[str, str]) -> None:
    shown = run_python("import ctf.cli.main as m; m.program()", **variable)
    assert shown.returncode == 0 and "\x1b" not in shown.stdout
    assert shown.stdout.startswith("usage: ctf")


def test_names_are_printed_as_they_are(ctf: Command, capsys: pytest.CaptureFixture[str]) -> None:
    from ctf.cli.common import print_table, show
    from ctf.common.progress import show_progress

    names = ("[red]", "[/]", ":cat:", "[link=file:x]y[/link]", "a [b]")
    for name in names:
        show(name)
    print_table(("name", "[x]"), [(name, "") for name in names])
    with show_progress("[/bold]") as progress:
        progress(1, 1)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[: len(names)] == list(names)
    assert all(captured.out.count(name) == 2 for name in names)
    assert "[/bold]: 1/1" in captured.err


def test_names_do_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from ctf.cli.common import show

    show("\x1b[31mred\x07 \udcff")
    assert capsys.readouterr().out == "\\x1b[31mred\\x07 \\xff\n"
