"""The `ctf` program: parses the command line, runs the command, and reports errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from ctf.cli import pipelines, research, stages  # noqa: F401  they register the commands
from ctf.cli.common import GROUPS, app, console, groups
from ctf.cli.options import registry
from ctf.common.errors import Stopped, UserError

DESCRIPTION = "Coarse-to-fine token prediction: train image generators and sample from them."

for _name, _group in groups.items():
    app.command(_group, name=_name, help=GROUPS[_name])


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line; by default that of the process.

    Returns:
        Exit code: 0, 2 for a user's mistake, or 130 if it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run: Callable[[], None] = app.cli(
                prog="ctf",
                args=arguments or ["--help"],
                description=DESCRIPTION,
                registry=registry,
            )
    except SystemExit as exit_:
        if errors.getvalue():
            print(f"ctf: {_one_line(errors.getvalue())}", file=sys.stderr)
        return int(exit_.code or 0)
    # Of several processes that raise the same error, only the first one's message is not empty.
    try:
        run()
    except Stopped as stopped:
        if str(stopped):
            console.print(stopped, soft_wrap=True)
        return 0
    except UserError as error:
        if str(error):
            print(f"ctf: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"ctf: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ctf: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def _one_line(text: str) -> str:
    """Join the lines of tyro's box around an error."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    return "; ".join(line for line in lines if line)


def program() -> NoReturn:
    """Run `main` and end the process with its exit code."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(main())
    # A process of torchrun ends without Python's shutdown: threads of gloo that are still running
    # then can abort it ("terminate called without an active exception") or block it forever.
    code = 1
    try:
        code = main()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
