"""What the site is built from besides the pages: help texts, public names, source files."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import ctf

ROOT = Path(__file__).parents[1]
MODELS = [
    "tokenizer",
    "clusters",
    "transformer",
    "coarse",
    "fine",
    "objectives",
    "noise",
    "sampling",
    "parallel",
    "drafts",
    "sizes",
    "points",
]
# A link from a page to a file of the repository that lies outside of docs.
OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:src|examples|spaces|tests|scripts)/[^)#\s]+)\)")

log = logging.getLogger("mkdocs.hooks")  # a warning fails the build, since it is strict


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the source files that pages link to."""
    linked: set[str] = set()
    for page in files.documentation_pages():
        linked.update(OUTSIDE.findall(page.content_string))
    for path in sorted(linked):
        if not (ROOT / path).is_file():
            log.warning("a page links to %s, which is not a file", path)
        elif not path.startswith("src/ctf/models/"):
            name = f"files/{path}.txt"  # as text, so that a browser shows it
            files.append(File.generated(config, name, content=(ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the reference pages, and points links to source files to where the site has them."""
    match page.file.src_uri:
        case "reference/commands.md":
            markdown = markdown.replace("<!-- commands -->", commands())
        case "reference/python.md":
            markdown = markdown.replace("<!-- public names -->", public_names())
        case "reference/models.md":
            modules = "\n\n".join(f"::: ctf.models.{name}" for name in MODELS)
            markdown = markdown.replace("<!-- modules of ctf.models -->", modules)
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)

    def link(found: re.Match[str]) -> str:
        path = found[1]
        if path.startswith("src/ctf/models/"):
            module = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
            return f"]({up}reference/models.md#{module})"
        return f"]({up}files/{path}.txt)"

    return OUTSIDE.sub(link, markdown)


def public_names() -> str:
    """A block of mkdocstrings for each name of `ctf.__all__`; each must have a docstring."""
    blocks = []
    for name in ctf.__all__:
        value: Any = getattr(ctf, name)
        if isinstance(value, str):  # the version
            continue
        if not (value.__doc__ or "").strip():
            log.warning("ctf.%s has no docstring", name)
        path = f"{value.__module__}.{value.__qualname__}"
        if path.startswith("ctf.models."):
            blocks.append(f"## {name}\n\nSee [the models](models.md#{path}).")
        else:
            blocks.append(f"::: {path}")
    # Pipeline has these as methods.
    return "\n\n".join([*blocks, "::: ctf.pipelines.editing"])


def commands() -> str:
    """The help of `ctf` and of all its commands, as Markdown."""
    texts = [_section([])]
    for name in _subcommands(_help([])):
        texts.append(_section([name]))
        texts += [_section([name, inner]) for inner in _subcommands(_help([name]))]
    return "\n\n".join(texts)


def _section(command: list[str]) -> str:
    title = " ".join(["ctf", *command])
    return f"{'##' if len(command) < 2 else '###'} {title}\n\n```text\n{_help(command)}\n```"


def _help(command: list[str]) -> str:
    os.environ.update(COLUMNS="80", NO_COLOR="1")
    main = importlib.import_module("ctf.cli.main").main
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main([*command, "--help"])
    return output.getvalue().strip()


def _subcommands(text: str) -> list[str]:
    """The names that the usage line of a help text lists."""
    usage = re.search(r"\{([a-z0-9,-]+)\}", text.split("\n\n")[0])
    return usage[1].split(",") if usage and " subcommands " in text else []
