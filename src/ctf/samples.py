"""What is drawn, as files: a contact sheet, or a folder of pictures with codes and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ctf import checkpoint
from ctf.errors import UserError
from ctf.pipeline import Pipeline, Samples, check_seed
from ctf.sheet import sheet

WIDEST = 16  # pictures in a row of a sheet
MOST_ON_A_SHEET = 1024

Report = Callable[[int, int], None]


def class_sheet(
    pipe: Pipeline,
    classes: Sequence[int | str],
    count: int,
    seed: int = 0,
    report: Report | None = None,
    resize: int | None = None,
    **settings: Any,
) -> tuple[Image.Image, Samples]:
    """`count` pictures of each class on one sheet, a row or more for each, and the samples.

    Picture i of the sheet, row by row, is drawn from seed + i.
    """
    numbers = pipe.class_numbers(classes)
    wanted = [number for number in numbers for _ in range(count)]
    drawn = pipe.sample(wanted, seed, resize=resize, report=report, **settings)
    return contact_sheet(drawn.images, [pipe.class_names[n] for n in numbers], count), drawn


def contact_sheet(images: Sequence[Image.Image], names: Sequence[str], count: int) -> Image.Image:
    """`count` of the images for each of the names, in order."""
    rows = []
    for i, name in enumerate(names):
        of_class = images[i * count : (i + 1) * count]
        for start in range(0, count, WIDEST):
            rows.append((name if start == 0 else "", of_class[start : start + WIDEST]))
    return sheet(rows)


def check(out: Path, count: int, classes: int, seed: int) -> None:
    """Finds what would keep `write` from writing `count` pictures of each of some classes.

    Raises:
        UserError: nothing or too much to draw, an `out` of no use, or one that holds something
            else.
    """
    if count < 1:
        raise UserError(f"count is {count}, expected 1 or more pictures of each class")
    check_seed(seed, classes * count)
    if out.suffix.lower() == ".png":
        if classes * count > MOST_ON_A_SHEET:
            raise UserError(
                f"{classes * count} pictures on one sheet; expected {MOST_ON_A_SHEET} or "
                "less: choose a folder for --out"
            )
    elif out.suffix:
        raise UserError(f"{out}: expected a name ending in .png, or a folder")
    elif not (checkpoint.is_vacant(out) or (out / "settings.json").is_file()):
        raise UserError(f"{out} exists and holds no samples; choose another --out")


def write(
    pipe: Pipeline,
    out: Path,
    classes: Sequence[int | str],
    count: int,
    seed: int = 0,
    report: Report | None = None,
    resize: int | None = None,
    **settings: Any,
) -> str:
    """Draws `count` pictures of each class into `out`; returns what was written, in words.

    out: a file that ends in .png: a contact sheet. Otherwise a folder: 000000.png, ... with
    codes.npz (codes, coarse, classes, seeds) and settings.json, which says how to draw them again.

    Raises:
        UserError: see `check` and `Pipeline.sample`.
    """
    check(out, count, len(classes), seed)
    if out.suffix.lower() == ".png":
        picture, _ = class_sheet(pipe, classes, count, seed, report, resize, **settings)
        with checkpoint.atomic(out) as temporary:
            picture.save(temporary, format="PNG")
        return f"{out}: {picture.width} x {picture.height} pixels"
    chosen = pipe.class_numbers(classes)
    numbers = [number for number in chosen for _ in range(count)]
    drawn = pipe.sample(numbers, seed, resize=resize, report=report, **settings)
    # First: it marks the folder as ours, if writing should be cut short.
    used = {**dataclasses.asdict(pipe.sampling), **settings}
    checkpoint.save_json(
        out / "settings.json",
        {"classes": chosen, "count": count, "seed": seed, "resize": resize, "sampling": used},
    )
    for older in out.glob("[0-9]*.png"):  # of another call, which drew more
        if older.stem.isdigit() and int(older.stem) >= len(numbers):
            older.unlink()
    for i, image in enumerate(drawn.images):
        with checkpoint.atomic(out / f"{i:06d}.png") as temporary:
            image.save(temporary, format="PNG")
    with checkpoint.atomic(out / "codes.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            codes=drawn.codes.numpy(),
            coarse=drawn.coarse.numpy(),
            classes=np.array(numbers),
            seeds=np.arange(seed, seed + len(numbers)),
        )
    return f"{out}: {len(numbers)} pictures, codes.npz, settings.json"
