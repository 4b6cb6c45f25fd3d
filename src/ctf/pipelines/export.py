"""Samples as files: a contact sheet or a folder of images, and the settings to sample them again.

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
from ctf.pipelines.arguments import check_seed
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline

SETTINGS = "settings.json"
MAX_COLUMNS = 16  # of a contact sheet
MAX_ON_SHEET = 1024  # images


@dataclasses.dataclass(frozen=True)
class Settings:
    """The content of settings.json, in a folder of samples or an evaluation, or from the studio.

    Args:
        classes: Their numbers.
        count: Images of each class.
        seed: Image i is sampled from seed + i.
        sampling: Settings of both stages.
        resize: Pixels per side, instead of the tokenizer's.
        model: The name of the pipeline, or its folder.
        weights: Its hash, see `hash_pipeline`.
        codes: (L,), see `Pipeline.sample`; the same for all images.
        keep: (L,), which of `codes` are known.
        coarse: (L,), labels to sample the fine stage for, see `Pipeline.refine`.
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
            if not all(-(2**63) <= number < 2**63 for number in getattr(self, name) or ()):
                raise UserError(f"settings: {name}: expected whole numbers of 64 bits")

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file: all fields but optional ones that are None."""
        content = config.to_json(self)
        return {k: v for k, v in content.items() if v is not None or k == "resize"}

    def class_per_image(self) -> list[int]:
        """Return the class of each image, `count` times each."""
        return [number for number in self.classes for _ in range(self.count)]


def load(path: Path) -> Settings:
    """Load a settings file, or that of a folder of samples.

    Raises:
        UserError: The file is missing, or is not a settings file.
    """
    if path.is_dir():
        path /= SETTINGS
    return config.from_json(Settings, storage.load_object(path), str(path))


def sample(
    pipe: Pipeline,
    settings: Settings,
    *,
    decode_separately: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """Sample the images of some settings; their model and hash are not compared with `pipe`.

    Raises:
        UserError: The settings do not fit the pipeline; see `Pipeline.sample`.
    """
    classes: Any = np.array(settings.class_per_image())  # numbers, whatever the names are
    seed = settings.seed
    options: dict[str, Any] = {
        "resize": settings.resize,
        "decode_separately": decode_separately,
        "progress": progress,
        **vars(settings.sampling),
    }
    if settings.coarse is not None:
        return pipe.refine(classes, torch.tensor(settings.coarse), seed, **options)
    codes = None if settings.codes is None else torch.tensor(settings.codes)
    known = None if settings.keep is None else torch.tensor(settings.keep)
    return pipe.sample(classes, seed, codes=codes, known=known, **options)


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file: the same bytes for the same pixels."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def class_sheet(
    pipe: Pipeline, classes: Sequence[int], count: int, progress: Progress | None = None
) -> Image.Image:
    """Sample a contact sheet with `count` images of each class, from seed 0 on."""
    settings = Settings(tuple(classes), count, 0, pipe.sampling)
    samples = sample(pipe, settings, progress=progress)
    return contact_sheet(samples.images, [pipe.class_names[number] for number in classes], count)


def contact_sheet(images: Sequence[Image.Image], names: Sequence[str], count: int) -> Image.Image:
    """Arrange `count` images for each name, in order, in rows below it."""
    rows = []
    for i, name in enumerate(names):
        of_class = images[i * count : (i + 1) * count]
        for start in range(0, count, MAX_COLUMNS):
            rows.append((name if start == 0 else "", of_class[start : start + MAX_COLUMNS]))
    return image_grid(rows)


def check(out: Path, settings: Settings) -> None:
    """Check what can be checked before sampling.

    Raises:
        UserError: Too few or too many images; `out` holds something else, or has another suffix
            than .png.
    """
    images = len(settings.classes) * settings.count
    if settings.count < 1:
        raise UserError(f"count is {settings.count}, expected 1 or more images of each class")
    check_seed(settings.seed, images)
    if out.suffix.lower() == ".png":
        if images > MAX_ON_SHEET:
            raise UserError(
                f"{images} images on one sheet, expected {MAX_ON_SHEET} or fewer: "
                "choose a folder for --out"
            )
        if out.is_dir():
            raise UserError(f"{out}: cannot be written, it is a folder; choose another name")
    elif out.suffix.lower() in Image.registered_extensions():  # "samples-1.5" is a folder
        raise UserError(f"{out}: expected a name ending in .png, or a folder")
    else:
        claims.is_ours(out, SETTINGS, what="a folder of samples")


def write(
    pipe: Pipeline,
    out: Path,
    settings: Settings,
    *,
    again: bool = False,
    progress: Progress | None = None,
) -> str:
    """Sample the images of some settings and write them.

    Args:
        pipe: The pipeline.
        out: A name ending in .png for a contact sheet; otherwise a folder for 000000.png, ...,
            codes.npz (codes, coarse, classes, seeds) and settings.json.
        settings: What to sample.
        again: Reproduce the files of `settings`: a single image is written as it is, as the studio
            has it, instead of on a contact sheet.
        progress: Called with the numbers of images sampled and to sample.

    Returns:
        What was written, for the user.

    Raises:
        UserError: See `check` and `Pipeline.sample`.
    """
    check(out, settings)
    samples = sample(pipe, settings, progress=progress)
    if out.suffix.lower() != ".png":
        _write_folder(out, samples, settings)
        return f"{out}: {len(samples.images)} images, codes.npz, settings.json"
    image = samples.images[0]
    if not again or len(samples.images) > 1:
        names = [pipe.class_names[number] for number in settings.classes]
        image = contact_sheet(samples.images, names, settings.count)
    storage.save_png(out, image)
    return f"{out}: {image.width} x {image.height} pixels"


def _write_folder(out: Path, samples: Samples, settings: Settings) -> None:
    # First, so that the folder is recognised as one of samples if writing is interrupted.
    storage.save_json(out / SETTINGS, settings.to_json())
    for old in out.glob("[0-9]*.png"):  # of an earlier call with more images
        if old.stem.isdigit() and int(old.stem) >= len(samples.images):
            old.unlink()
    for i, image in enumerate(samples.images):
        storage.save_png(out / f"{i:06d}.png", image)
    with storage.atomic(out / "codes.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            codes=samples.codes.numpy(),
            coarse=samples.coarse.numpy(),
            classes=np.array(settings.class_per_image()),
            seeds=np.arange(settings.seed, settings.seed + len(samples.images)),
        )
