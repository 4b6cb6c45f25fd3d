"""What a source of pictures is, by its name: a folder, or files that hold many pictures each."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.data.sources import Files, Folder
from ctf.data.tables import Tables
from ctf.data.tars import Tars

# Files that hold many pictures, by their suffix.
HOLDERS: dict[str, Callable[[Path, str, Sequence[Path], Path | None], Files]] = {
    ".tar": Tars,
    ".parquet": Tables,
}


def find(source: str, included: Sequence[str]) -> Files:
    """The pictures of a folder, of a file of `HOLDERS`, or of several.

    Several are a folder that holds nothing else, or a pattern like "data/train-*.tar". Pictures in
    a folder come first: files of `HOLDERS` beside them are not looked at.

    Args:
        included: names that stand for no files, for what is said of a wrong one.

    Raises:
        UserError: there is nothing of that name, or it is of another kind.
    """
    where = Path(source)
    if where.is_file():
        return _open(where, where.stem, [where], None)
    if where.is_dir():
        folder = Folder(where)
        inside = sorted(path for path in where.iterdir() if path.suffix in HOLDERS)
        return folder if folder.names or not inside else _open(where, folder.title, inside, where)
    if found := sorted(map(Path, glob.glob(source))):
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), where.parts))
        return _open(where, base.resolve().name, found, base)
    raise UserError(
        f"{source}: no such folder, nor an included set of that name"
        f"{did_you_mean(source, included)}"
    )


def _open(where: Path, title: str, paths: list[Path], base: Path | None) -> Files:
    kinds = {path.suffix for path in paths}
    if len(kinds) > 1 or not kinds <= HOLDERS.keys():
        got = "is a file" if base is None else f"is files of {', '.join(sorted(kinds))}"
        raise UserError(
            f"{where}: {got}; expected a folder of pictures, or {' or '.join(HOLDERS)} files alone"
        )
    return HOLDERS[kinds.pop()](where, title, paths, base)
