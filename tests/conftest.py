"""Shared by the tests: images in many formats, a recipe that trains in seconds, and a run of it."""

import colorsys
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before anything imports huggingface_hub: no test uses the network. The Hub's tests have a server.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test writes into the user's cache.
os.environ["CTF_CACHE"] = tempfile.mkdtemp(prefix="ctf-tests-")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from ctf.cli import main as cli
from ctf.data import image_set, images
from ctf.pipelines.pipeline import Pipeline

# No example has a limit of time, which other work on the machine would exceed.
settings.register_profile("ctf", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ctf")

CLASSES = ("blue", "green", "red")
HUES = {"blue": 0.62, "green": 0.33, "red": 0.0}
SIDE = 32  # image size of the run

# Makes the preset `tiny` smaller, so that all stages together take seconds.
SMALLER_RECIPE = (
    "tokenizer.codebook_size=64", "tokenizer.channels=8", "tokenizer.latent_channels=16",
    "tokenizer.largest_grid=4", "tokenizer_training.batch_size=8", "clusters.count=8",
    "coarse.width=32", "coarse.layers=2", "coarse.heads=2", "coarse_training.batch_size=8",
    "fine.width=32", "fine.layers=1", "fine.heads=2", "fine_training.batch_size=8",
)  # fmt: skip
STEPS = 40


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def three_threads() -> Iterator[None]:
    """PyTorch computes with three threads, as on a machine of three cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def disc_image(hue: float, seed: int) -> Image.Image:
    """A bright disc of about that hue on a dark background, 48 x 40 pixels, RGB."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:40, 0:48]
    centre_y, centre_x, radius = random.uniform((12, 14, 7), (28, 34, 13))
    disc = ((y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2)[..., None]
    bright, dark = (
        np.array(colorsys.hsv_to_rgb((hue + random.uniform(-0.05, 0.05)) % 1, 0.9, value))
        for value in (random.uniform(0.7, 1.0), 0.15)
    )
    pixels = np.where(disc, bright, dark) + random.normal(0, 0.02, (40, 48, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def save_images(root: Path, count: int = 8) -> Path:
    """Save `count` images per class, in a subfolder each, in all formats and several modes."""
    for number, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            image = disc_image(HUES[name], seed=100 * number + i)
            match i % 8:
                case 0:
                    image.save(folder / f"{i}.jpg", quality=92)
                case 1:
                    image.save(folder / f"{i}.webp", quality=92)
                case 2:
                    image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / f"{i}.gif")
                case 3:
                    image.putalpha(image.convert("L").point(lambda value: 255 * (value > 10)))
                    image.save(folder / f"{i}.png")
                case 4:
                    image.convert("CMYK").save(folder / f"{i}.tif")
                case 5:
                    rotated = image.transpose(Image.Transpose.ROTATE_90)
                    exif = Image.Exif()
                    exif[0x0112] = 6  # orientation: rotate back
                    rotated.save(folder / f"{i}.jpeg", exif=exif, quality=92)
                case 6:
                    image.save(folder / f"{i}.bmp")
                case _:
                    image.save(folder / f"{i}.png")
    return root


def recipe_options(*more: str) -> list[str]:
    """`--set` with the values of the small recipe, and more."""
    return ["--set", *SMALLER_RECIPE, *more]


def fit_arguments(image_folder: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    """The arguments of `ctf fit` with the small recipe."""
    size, count = str(SIDE), str(steps)
    return [
        "fit", str(image_folder), "--out", str(out), "--preset", "tiny", "--image-size", size,
        "--steps", count, *more, *recipe_options(),
    ]  # fmt: skip


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


TIMES = ("seconds", "tokens_per_second", "images_per_second")  # differ between equal runs


def without_times(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, without the values that depend on time."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def comparable(run: Path) -> dict[str, Any]:
    """All that is the same in two runs of one recipe, however often one was killed."""
    content: dict[str, Any] = dict(read_files(run))
    for path in run.rglob("metrics.jsonl"):
        content[str(path.relative_to(run))] = without_times(path.parent)
    for name in {"fit.json", "pipeline.json"} & content.keys():
        content[name] = json.loads(content[name])
        content[name].get("origin", content[name]).pop("seconds", None)
    return content


def weights(run: Path) -> dict[str, Any]:
    """Everything in a run that is the same however often it was logged, and whatever killed it."""
    return {
        name: content
        for name, content in comparable(run).items()
        if name not in ("fit.json", "pipeline.json") and not name.endswith("metrics.jsonl")
    }


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images") / "discs")


@pytest.fixture(scope="session")
def splits(image_folder: Path) -> image_set.Splits:
    return images.open_images(str(image_folder), SIDE)


@pytest.fixture(scope="session")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `ctf fit`; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert cli.main(fit_arguments(image_folder, out)) == 0
    return out


@pytest.fixture
def pipe(run: Path) -> Pipeline:
    return Pipeline.from_pretrained(run)


@pytest.fixture
def ctf(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def command(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return command
