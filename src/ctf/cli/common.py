"""How commands are registered, and what they share besides options."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro
from rich.console import Console

from ctf.cli.options import DeviceName, Engine, ImageOptions
from ctf.common.errors import UserError
from ctf.common.text import printable

app = tyro.extras.SubcommandApp()
GROUPS = {
    "tokenizer": "Train and evaluate tokenizers, which turn images into codes and back.",
    "tokens": "Encode the images of a data set into codes, and verify them.",
    "clusters": "Cluster the codes of a tokenizer.",
    "train": "Train the transformers of a run: coarse, fine, or the full-vocabulary baseline.",
    "runs": "Follow training runs: plots and TensorBoard.",
    "classifier": "Train the classifier that measures the class accuracy of samples.",
    "convert": "Convert the weights of other projects.",
    "bench": "Measure speed, memory and quality.",
}
groups = {name: tyro.extras.SubcommandApp() for name in GROUPS}
commands: dict[str, Callable[..., Callable[[], None]]] = {}  # by their names of one or two words
# Results go to standard output, progress and errors to standard error. Names of files and classes
# are printed as they are: "[red]" is no style, and ":cat:" no emoji.
console = Console(highlight=False, markup=False, emoji=False)

FILES = (".png", ".json")  # endings of an --out that is a file

F = TypeVar("F", bound=Callable[..., None])


def command(name: str) -> Callable[[F], F]:
    """Register a command, e.g. "sample" or "tokens extract"."""
    group, _, inner = name.rpartition(" ")

    def register(function: F) -> F:
        # One line for each argument: tyro keeps the line breaks in docstrings of functions.
        function.__doc__ = re.sub(r"\n {12,}", " ", function.__doc__ or "")

        # Parsing returns the call to make, since errors of the two are handled differently.
        @functools.wraps(function)
        def parsed(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(_run, function, *args, **kwargs)

        parent = groups[group] if group else app
        parent.command(name=inner)(parsed)
        commands[name] = parsed
        return function

    return register


def _run(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a command, after checking that its --out can be written."""
    from ctf.common import storage

    unused = (function.__kwdefaults__ or {}).get("out") if kwargs.get("dry_run") else None
    for out in (kwargs.get("out"), getattr(kwargs.get("evaluation"), "out", None)):
        if out is None or out == unused:
            continue
        if os.path.lexists(out) and not out.is_dir() and out.suffix.lower() not in FILES:
            raise UserError(f"{out} exists, and is not a folder; choose another folder")
        storage.check_writable(out)
    function(*args, **kwargs)


def open_device(name: DeviceName) -> Any:
    """Return the torch.device of that name.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if has["cuda"] else "cpu")
    if not has[name]:
        expected = " or ".join(["auto", *(device for device in has if has[device])])
        raise UserError(f"device {name}: not available on this machine, expected {expected}")
    return torch.device(name)


def open_splits(
    images: str,
    options: ImageOptions,
    image_size: int | None = None,
    preset: str | None = None,
    world: Any = None,
    *,
    out: Path | None = None,
    full: bool = False,
) -> Any:
    """Open images with `open_images`, at the preset's size by default, and print their summary.

    Raises:
        UserError: see `open_images`, and `claims.check_apart` for the folder `out`.
    """
    from ctf.common import claims
    from ctf.data.images import INCLUDED, open_images
    from ctf.data.summary import summarize
    from ctf.training.recipes import preset as preset_named

    if out is not None:
        claims.check_apart(out, Path(images))
    if image_size is None and preset is not None and images not in INCLUDED:
        image_size = preset_named(preset).image_size

    def open_and_show() -> Any:
        with open_progress("images", world) as progress:
            return open_images(images, image_size, **vars(options), progress=progress)

    if world is not None:
        world.on_main(open_and_show)  # the others then find the scan in the cache
    splits = open_and_show()
    show(summarize(splits, full=full), world)
    return splits


def open_progress(name: str, world: Any = None) -> Any:
    """Show the progress of a stage, in the first process only."""
    from ctf.common.progress import show_progress

    if world is not None and not world.is_main:
        return contextlib.nullcontext()
    return show_progress(name)


def show(text: object, world: Any = None) -> None:
    """Print a result, in the first process only; lines are not wrapped."""
    if world is None or world.is_main:
        console.print(printable(str(text)), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, at its full width if it goes into a file."""
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(printable, row))
    if console.is_terminal:
        console.print(table)
    else:
        width = Measurement.get(console, console.options.update(width=1000), table).maximum
        console.print(table, width=width, crop=False)


def parse_engines(text: str) -> Any:
    """Split the names of engines at commas.

    Raises:
        UserError: an unknown name.
    """
    from ctf.common.config import did_you_mean

    engines = tuple(part.strip() for part in text.split(","))
    for name in engines:
        if name not in get_args(Engine):
            raise UserError(f"unknown engine {name!r}{did_you_mean(name, get_args(Engine))}")
    return engines


def check_minutes(minutes: float) -> None:
    """Raise UserError unless a training time is positive and finite."""
    if not 0 < minutes < 1e6:
        raise UserError(f"minutes: got {minutes:g}, expected more than 0")
