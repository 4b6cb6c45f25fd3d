"""What is drawn, as files: a contact sheet, or a folder of pictures with codes and settings; and
settings as files, that draw the same pictures again.

Shapes: L tokens of an image.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ctf.common import claims, config, storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.image_grid import image_grid
from ctf.models.sampling import Sampling
from ctf.pipelines.pipeline import Pipeline, Samples, check_seed

WIDEST = 16  # pictures in a row of a sheet
MOST_ON_A_SHEET = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that pictures follow from: settings.json beside samples, and what the studio saves.

    Args:
        classes: their numbers.
        count: pictures of each class.
        seed: picture i is drawn from seed + i.
        sampling: settings of both stages.
        resize: pixels a side, instead of the tokenizer's.
        model: what the pipeline was called where they were drawn.
        weights: which pipeline that was, see `hash_pipeline`.
        codes, keep: (L,), what is given of every picture, see `Pipeline.sample`.
        coarse: (L,), labels whose details are drawn, see `Pipeline.refine`.
    """

    classes: tuple[int, ...]
    count: int
    seed: int
    sampling: Sampling
    resize: int | None = None
    model: str | None = None
    weights: str | None = None
    codes: tuple[int, ...] | None = None
    keep: tuple[bool, ...] | None = None
    coarse: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.coarse is not None and (self.codes is not None or self.keep is not None):
            raise UserError("settings: got coarse and codes, expected one of them")
        for name in ("codes", "coarse"):
            given = getattr(self, name)
            if given is not None and not all(-(2**63) <= number < 2**63 for number in given):
                raise UserError(f"settings: {name}: expected whole numbers of 64 bits")

    def to_json(self) -> dict[str, Any]:
        """For `load`, without what is not set."""
        plain = config.to_json(self)
        return {k: v for k, v in plain.items() if v is not None or k == "resize"}


def load(path: Path) -> Settings:
    """Raises UserError where there is no such file, or not one of settings."""
    return config.from_json(Settings, storage.load_object(path), str(path))


def draw(pipe: Pipeline, settings: Settings, progress: Progress | None = None) -> Samples:
    """The pictures of some settings, each decoded by itself: the same bytes, whatever it was drawn
    beside.

    Raises:
        UserError: the settings are none of this pipeline; see `Pipeline.sample`.
    """
    numbers = [number for number in settings.classes for _ in range(settings.count)]
    more: dict[str, Any] = {"resize": settings.resize, "apart": True, "report": progress}
    more |= {f.name: getattr(settings.sampling, f.name) for f in dataclasses.fields(Sampling)}
    if settings.coarse is not None:
        return pipe.refine(numbers, torch.tensor(settings.coarse), settings.seed, **more)
    codes = None if settings.codes is None else torch.tensor(settings.codes)
    keep = None if settings.keep is None else torch.tensor(settings.keep)
    return pipe.sample(numbers, settings.seed, codes=codes, keep=keep, **more)


def png(image: Image.Image) -> bytes:
    """A picture as a file: the same bytes for the same pixels."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def class_sheet(
    pipe: Pipeline,
    classes: Sequence[int | str],
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
    resize: int | None = None,
    **settings: Any,
) -> tuple[Image.Image, Samples]:
    """`count` pictures of each class on one sheet, a row or more for each, and the samples.

    Picture i of the sheet, row by row, is drawn from seed + i.
    """
    numbers = pipe.class_numbers(classes)
    wanted = [number for number in numbers for _ in range(count)]
    drawn = pipe.sample(wanted, seed, resize=resize, report=progress, **settings)
    return contact_sheet(drawn.images, [pipe.class_names[n] for n in numbers], count), drawn


def contact_sheet(images: Sequence[Image.Image], names: Sequence[str], count: int) -> Image.Image:
    """`count` of the images for each of the names, in order."""
    rows = []
    for i, name in enumerate(names):
        of_class = images[i * count : (i + 1) * count]
        for start in range(0, count, WIDEST):
            rows.append((name if start == 0 else "", of_class[start : start + WIDEST]))
    return image_grid(rows)


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
    else:
        claims.is_ours(out, "settings.json", what="a folder of samples")


def write(
    pipe: Pipeline,
    out: Path,
    classes: Sequence[int | str],
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
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
        picture, _ = class_sheet(pipe, classes, count, seed, progress, resize, **settings)
        return _write_picture(out, picture)
    chosen = pipe.class_numbers(classes)
    numbers = [number for number in chosen for _ in range(count)]
    drawn = pipe.sample(numbers, seed, resize=resize, report=progress, **settings)
    used = dataclasses.replace(pipe.sampling, **settings)
    return _write_folder(out, drawn, Settings(tuple(chosen), count, seed, used, resize))


def write_again(
    pipe: Pipeline, out: Path, settings: Settings, progress: Progress | None = None
) -> str:
    """Draws the pictures of some settings into `out`; returns what was written, in words.

    out: as in `write`, but a single picture becomes the .png file itself.

    Raises:
        UserError: see `check` and `draw`.
    """
    check(out, settings.count, len(settings.classes), settings.seed)
    drawn = draw(pipe, settings, progress)
    if out.suffix.lower() != ".png":
        return _write_folder(out, drawn, settings)
    if len(drawn.images) == 1:
        return _write_picture(out, drawn.images[0])
    names = [pipe.class_names[number] for number in settings.classes]
    return _write_picture(out, contact_sheet(drawn.images, names, settings.count))


def _write_picture(out: Path, picture: Image.Image) -> str:
    with storage.atomic(out) as temporary:
        temporary.write_bytes(png(picture))
    return f"{out}: {picture.width} x {picture.height} pixels"


def _write_folder(out: Path, drawn: Samples, settings: Settings) -> str:
    # First: it marks the folder as ours, if writing should be cut short.
    storage.save_json(out / "settings.json", settings.to_json())
    for older in out.glob("[0-9]*.png"):  # of another call, which drew more
        if older.stem.isdigit() and int(older.stem) >= len(drawn.images):
            older.unlink()
    for i, image in enumerate(drawn.images):
        with storage.atomic(out / f"{i:06d}.png") as temporary:
            temporary.write_bytes(png(image))
    with storage.atomic(out / "codes.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            codes=drawn.codes.numpy(),
            coarse=drawn.coarse.numpy(),
            classes=np.array([n for n in settings.classes for _ in range(settings.count)]),
            seeds=np.arange(settings.seed, settings.seed + len(drawn.images)),
        )
    return f"{out}: {len(drawn.images)} pictures, codes.npz, settings.json"
