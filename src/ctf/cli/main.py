"""The `ctf` program: parses the command line, runs the command, and reports errors."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

# All but streams register their commands, whose order is that of the help text.
from ctf.cli import fit, pipelines, publish, research, stages, streams, training  # noqa: F401
from ctf.cli.common import show
from ctf.cli.parsing import parse
from ctf.common.errors import Stopped, UserError
from ctf.common.text import printable


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line; by default that of the process.

    Returns:
        Exit code: 0, 2 for a user's mistake, or 130 if it was interrupted.
    """
    # Of several processes that raise the same error, only the first one's message is not empty.
    try:
        call = parse(sys.argv[1:] if arguments is None else arguments)
        _check_current_folder()
        call()
    except SystemExit as exit_:  # after a help text
        return int(exit_.code or 0)
    except Stopped as stopped:
        if str(stopped):
            show(stopped)
        return 0
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        if (reason := _reason(error)) is None:
            raise
        return _refuse(reason)
    except KeyboardInterrupt:
        print(
            "ctf: interrupted; what is finished is kept, run the same command again",
            file=sys.stderr,
        )
        return 130
    return 0


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:  # neither relative paths nor PyTorch's libraries work in it
        raise UserError("the current folder has been deleted; change to another one") from None


def _refuse(message: str) -> int:
    if message:
        print(f"ctf: {printable(message)}", file=sys.stderr)
    return 2


def _reason(error: OSError) -> str | None:
    """Return the message for an error of the system that the user can fix."""
    from pathlib import Path

    from ctf.common import storage

    if isinstance(error, PermissionError):
        return f"{error.filename}: {error.strerror}"
    if error.filename is None or isinstance(error.filename, int):
        return None
    reason = storage.write_error(Path(os.fsdecode(error.filename)), error)
    return str(reason) if isinstance(reason, UserError) else None


def program() -> NoReturn:
    """Run `main` and end the process with its exit code."""
    streams.prepare()
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
