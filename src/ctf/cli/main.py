"""Coarse-to-fine token prediction: from a folder of pictures to a model that draws."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from ctf.cli import pipelines, research, stages  # noqa: F401  they register commands
from ctf.cli.common import app, console, groups
from ctf.common.errors import Stopped, UserError

for _name, _group in groups.items():
    app.command(_group, name=_name)


def _complaint(text: str) -> str:
    """What tyro says in a box of several lines, as one."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    return "; ".join(line for line in lines if line)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 2 for a user's mistake.

    Where several processes say the same, only the first one's message is not empty.
    """
    given = sys.argv[1:] if arguments is None else arguments
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            run: Callable[[], None] = app.cli(
                prog="ctf", args=given or ["--help"], description=(__doc__ or "").splitlines()[0]
            )
    except SystemExit as leaving:
        if said.getvalue():
            print(f"ctf: {_complaint(said.getvalue())}", file=sys.stderr)
        return int(leaving.code or 0)
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
        print("ctf: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def program() -> NoReturn:
    """`main`, then the end of the process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(main())
    # One of torchrun's processes, which ends at once when all is written. Threads of gloo that are
    # still there when Python takes itself apart can abort it ("terminate called without an active
    # exception"), or wait forever.
    code = 1
    try:
        code = main()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
