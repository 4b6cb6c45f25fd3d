"""Samples as files: a contact sheet or a folder of images, and the settings to sample them again.

Shapes: L tokens of an image.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ctf import kernels
from ctf.common import claims, config, storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.image_grid import image_grid
from ctf.models import noise
from ctf.models.sampling import Sampling
from ctf.pipelines.arguments import check_seed
from ctf.pipelines.generation import BATCH_SIZE, Samples
from ctf.pipelines.pipeline import Pipeline

MAX_COLUMNS = 16  # of a contact sheet
MAX_ON_SHEET = 1024  # images
MAX_IMAGES = 10_000_000  # of a folder
SETTINGS, CODES, WHAT = "settings.json", "codes.npz", "a folder of samples"
BEGUN, REQUEST = ".begun", "request.json"  # a folder's, with the codes of whole batches


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
        noise_version: The version of the random numbers; other ones give other images.
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
    noise_version: int = noise.VERSION

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
    content = {"noise_version": 1, **storage.load_object(path)}  # the first version was not stored
    return config.from_json(Settings, content, str(path))


def sample(
    pipe: Pipeline,
    settings: Settings,
    *,
    rows: slice = slice(None),
    decode_separately: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """Sample the images of some settings; their model and hash are not compared with `pipe`.

    Args:
        pipe: The pipeline.
        settings: What to sample.
        rows: Which of the images.
        decode_separately: See `Pipeline.sample`.
        progress: See `Pipeline.sample`.

    Raises:
        UserError: The settings do not fit the pipeline; see `Pipeline.sample`.
    """
    classes: Any = np.array(settings.class_per_image()[rows])  # numbers, whatever the names are
    seed = settings.seed + (rows.start or 0)
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
    if images > MAX_IMAGES:
        raise UserError(f"got {images} images, expected {MAX_IMAGES:,} or fewer at a time")
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
        claims.is_ours(out, SETTINGS, what=WHAT)


def write(
    pipe: Pipeline,
    out: Path,
    settings: Settings,
    *,
    again: bool = False,
    weights: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Sample the images of some settings and write them, as batches end.

    If it is stopped, the same call continues after the last batch, and ends with the same files. A
    folder without codes.npz, or with .begun, is not finished.

    Args:
        pipe: The pipeline.
        out: A name ending in .png for a contact sheet; otherwise a folder for 000000.png, ...,
            codes.npz (codes, coarse, classes, seeds) and settings.json.
        settings: What to sample.
        again: Reproduce the files of `settings`: a single image is written as it is, as the studio
            has it, instead of on a contact sheet.
        weights: A hash of the pipeline, so that another one does not continue what it has begun.
        progress: Called with the numbers of images sampled and to sample.

    Returns:
        What was written, for the user.

    Raises:
        UserError: `out` has the begun images of other settings, another process writes into it, or
            see `check` and `Pipeline.sample`.
    """
    check(out, settings)
    job = _Job(pipe, settings, weights)
    if out.suffix.lower() != ".png":
        with claims.hold(out, SETTINGS, what=WHAT):
            job.sample_into(out, progress)
        return f"{out}: {job.count} images, codes.npz, settings.json"
    if job.count <= BATCH_SIZE:
        images: Sequence[Image.Image] = job.sample(0, progress).images
        _save_sheet(pipe, out, settings, images, again)
    else:
        folder = out.with_name(f".{out.name}{BEGUN}")  # until the sheet is finished
        with claims.hold(folder, SETTINGS, what=WHAT):
            job.sample_into(folder, progress)
            images = [_load(folder / _name(i)) for i in range(job.count)]
            _save_sheet(pipe, out, settings, images, again)
            shutil.rmtree(folder, ignore_errors=True)
    with Image.open(out) as image:
        return f"{out}: {image.width} x {image.height} pixels"


def _save_sheet(
    pipe: Pipeline, out: Path, settings: Settings, images: Sequence[Image.Image], again: bool
) -> None:
    image = images[0]
    if not again or len(images) > 1:
        names = [pipe.class_names[number] for number in settings.classes]
        image = contact_sheet(images, names, settings.count)
    storage.save_png(out, image)


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder of samples was begun and is not finished."""
    return (folder / BEGUN / REQUEST).is_file()


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


@dataclasses.dataclass(frozen=True)
class _Job:
    """Images to sample into a folder, batch by batch."""

    pipe: Pipeline
    settings: Settings
    weights: str | None

    @property
    def count(self) -> int:
        return len(self.settings.classes) * self.settings.count

    def sample(self, start: int, progress: Progress | None) -> Samples:
        """Sample the batch that begins with this image; an image depends on its seed alone."""

        def advance(done: int, _: int, *more: Any) -> None:
            if progress is not None:
                progress(start + done, self.count, *more)

        rows = slice(start, start + BATCH_SIZE)
        return sample(self.pipe, self.settings, rows=rows, progress=advance)

    def sample_into(self, folder: Path, progress: Progress | None) -> None:
        """Write the files of a folder of samples; those of whole batches are there already."""
        self._begin(folder)
        begun = folder / BEGUN
        starts = range(0, self.count, BATCH_SIZE)
        for start in starts:
            numbers = range(start, min(start + BATCH_SIZE, self.count))
            block = begun / f"{start:08d}.npz"
            if block.is_file() and all((folder / _name(i)).is_file() for i in numbers):
                if progress is not None:
                    progress(numbers.stop, self.count)
                continue
            samples = self.sample(start, progress)
            for number, image in zip(numbers, samples.images, strict=True):
                storage.save_png(folder / _name(number), image)
            codes = {"codes": samples.codes.numpy(), "coarse": samples.coarse.numpy()}
            storage.save_npz(block, codes)  # last: the batch is complete
        blocks = [np.load(begun / f"{start:08d}.npz") for start in starts]
        with storage.atomic(folder / CODES) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                codes=np.concatenate([block["codes"] for block in blocks]),
                coarse=np.concatenate([block["coarse"] for block in blocks]),
                classes=np.array(self.settings.class_per_image()),
                seeds=np.arange(self.settings.seed, self.settings.seed + self.count),
            )
        shutil.rmtree(begun)

    def _begin(self, folder: Path) -> None:
        """Prepare the folder, unless this job has begun there.

        Raises:
            UserError: Another job has begun there.
        """
        path, settings = folder / BEGUN / REQUEST, self.settings.to_json()
        request: dict[str, Any] = {"settings": settings, "weights": self.weights}
        models = [model for model in (self.pipe.coarse, self.pipe.fine) if model is not None]
        request["exact"] = all(kernels.is_exact(model) for model in models)
        if path.is_file():
            if difference := claims.first_difference(storage.load_json(path), request):
                done = sum(1 for block in path.parent.glob("*.npz"))
                raise UserError(
                    f"{folder}: has {min(done * BATCH_SIZE, self.count)} images of other settings, "
                    f"which were not finished: {difference}\n"
                    "finish them with the command that began them, or choose another folder"
                )
            storage.remove_temporaries(folder)
            return
        # What says that the folder is finished goes first, and the request, which says that it has
        # begun, comes last: a kill between leaves a folder that is begun anew.
        (folder / CODES).unlink(missing_ok=True)
        storage.save_json(folder / SETTINGS, settings)
        for old in folder.glob("[0-9]*.png"):
            if old.stem.isdigit():
                old.unlink()
        shutil.rmtree(path.parent, ignore_errors=True)
        storage.remove_temporaries(folder)
        storage.save_json(path, request)
