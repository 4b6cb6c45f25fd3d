"""Files inside an archive by their paths: no path is trusted, links are followed inside it only."""

from __future__ import annotations

import posixpath
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_LINKS = 40  # followed from one to the next, as Linux does
MAX_LINKED_FILES = 1_000_000  # in linked folders


class Span(NamedTuple):
    """Where a file is in an archive."""

    start: int  # byte of its content; in a .zip file, of its header
    stored: int  # bytes in the archive
    size: int  # bytes of the file
    method: int = -1  # compression method of a .zip file; -1 in a .tar file
    crc: int = 0  # of a .zip file


@dataclass
class Members:
    """What an archive lists.

    Attributes:
        files: every file by its path, in the order of the archive, hidden ones too; None for a link
            that is still to be followed.
        links: paths that links lead to, by the link's path.
        left_out: paths of what is not a readable file, by the reason.
        damage: why the archive may hold more than this; "" if it is intact.
    """

    files: dict[str, Span | None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    damage: str = ""

    def add(self, path: str, span: Span) -> None:
        """Add a file; of equal paths the last one counts, as when an archive is extracted."""
        if (name := self._name(path)) is None:
            return
        if self.files.get(name):
            self.left_out["replaced by a later file of the same name"].append(name)
        self.links.pop(name, None)
        self.files[name] = span

    def add_link(self, path: str, target: str, *, symbolic: bool) -> None:
        """Add a link to a path in the archive; a symbolic one starts at its own folder."""
        if (name := self._name(path)) is None:
            return
        folder = posixpath.dirname(name) if symbolic and not target.startswith("/") else ""
        goal = clean_path(target, folder)
        if goal is None:
            self.left_out["link out of the archive"].append(name)
        elif goal == name and self.files.get(name):  # a file that was added again
            return
        elif not symbolic and (span := self.files.get(goal)):  # as it is now, if replaced later
            self.add(path, span)
        else:
            self.links[name] = goal
            self.files[name] = None

    def follow_links(self) -> dict[str, Span]:
        """Return all files, with the names of links to files, and of files in linked folders."""
        names = sorted(self.files)
        found: dict[str, Span] = {}
        linked_files = 0
        for name, span in self.files.items():
            if span is None:
                goal = self._follow(name)
                span = self.files.get(goal) if goal is not None else None
            if span is not None:
                found[name] = span
                continue
            inside = _names_below(names, goal) if goal is not None else []
            if goal in (None, ".") or f"{name}/".startswith(f"{goal}/"):
                self.left_out["link to itself"].append(name)
            elif not inside:
                self.left_out["link to a file that is not in the archive"].append(name)
            elif (linked_files := linked_files + len(inside)) > MAX_LINKED_FILES:
                self.left_out[f"more than {MAX_LINKED_FILES:,} files in linked folders"].append(
                    name
                )
            else:
                for path in inside:
                    end = self._follow(path)
                    if end is not None and (linked := self.files.get(end)) is not None:
                        found.setdefault(name + path.removeprefix(goal), linked)
                    else:
                        self.left_out["link inside a linked folder"].append(path)
        return found

    def _name(self, path: str) -> str | None:
        name = clean_path(path)
        if name is None:
            self.left_out["path out of the archive"].append(path.replace("\0", ""))
        return name

    def _follow(self, name: str) -> str | None:
        """Return the path at the end of the links in a path; None if there is no end."""
        for _ in range(MAX_LINKS):
            parts = name.split("/")
            heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
            link = next((head for head in heads if head in self.links), None)
            if link is None:
                return name
            name = posixpath.join(self.links[link], name[len(link) + 1 :]).rstrip("/")
        return None


def clean_path(path: str, folder: str = "") -> str | None:
    """Return a member's path from the top of the archive; None if it is not inside it."""
    name = posixpath.normpath(posixpath.join(folder, path.replace("\0", "").lstrip("/")))
    return None if name == ".." or name.startswith("../") else name


def _names_below(names: list[str], folder: str) -> list[str]:
    """Return the names in a folder, from sorted names."""
    return names[bisect_left(names, f"{folder}/") : bisect_left(names, f"{folder}0")]  # "0" > "/"
