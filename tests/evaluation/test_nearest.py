"""The nearest training images of samples: found, compared, shown and reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ctf.common.errors import UserError
from ctf.common.rng import generator
from ctf.data.image_set import ImageSet, Splits
from ctf.data.images import open_images
from ctf.data.transforms import PLAIN, View
from ctf.evaluation import nearest, report
from ctf.evaluation.nearest import Search, find_nearest, interval, nearer, pixel_rows
from ctf.pipelines import card
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command
from tests.evaluation.helpers import (
    Pixels,
    collection,
    colour_extractor,
    noise,
    prepared,
    save_npz,
    silent,
)

# --- the statistic --------------------------------------------------------------------------------


def value(samples: Any, held_out: Any) -> float:
    return nearer(np.array(samples, float), np.array(held_out, float))


def test_the_share_of_pairs_in_closed_form() -> None:
    assert value([1, 2], [3, 4]) == 1.0
    assert value([3, 4], [1, 2]) == 0.0
    assert value([5, 5, 5], [5, 5]) == 0.5
    assert value([0, 2], [1, 2, 3]) == pytest.approx((3 + 0.5 + 1) / 6)


distances = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@settings(deadline=None)
@given(distances, distances)
def test_it_is_the_mean_over_all_pairs(samples: list[int], held_out: list[int]) -> None:
    pairs = [(s < h) + 0.5 * (s == h) for s in samples for h in held_out]
    assert value(samples, held_out) == pytest.approx(np.mean(pairs))
    assert value(samples, held_out) + value(held_out, samples) == pytest.approx(1.0)


def test_the_interval_covers_a_half_for_equal_distributions() -> None:
    covered = 0
    for seed in range(40):
        random = generator(seed, 1)
        one, other = random.normal(size=(2, 150))
        low, high = interval(one, other, random)
        assert low < nearer(one, other) < high
        covered += low <= 0.5 <= high
    assert covered >= 34  # of 38 expected


def test_the_interval_shrinks_with_the_number_of_images() -> None:
    widths = []
    for count in (50, 800):
        one, other = generator(3).normal(size=(2, count))
        low, high = interval(one, other, generator(4))
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


# --- the search -----------------------------------------------------------------------------------


def test_the_nearest_rows_are_those_of_all_distances() -> None:
    random = generator(5)
    queries, rows = random.normal(100, 1, (30, 7)), random.normal(100, 1, (90, 7))
    search = Search(queries)
    for block in np.split(rows, [1, 20, 77]):
        search.add(block)
    squares = np.square(queries[:, None] - rows).mean(2)
    assert np.array_equal(search.numbers_Q, squares.argmin(1))
    assert search.distances_Q == pytest.approx(np.sqrt(squares.min(1)), rel=1e-3)


def test_a_copy_has_distance_zero() -> None:
    pixels = pixel_rows(noise(20, 6, side=40))
    search = Search(pixels[:5])
    search.add(pixels)
    assert np.array_equal(search.numbers_Q, np.arange(5))
    assert np.array_equal(search.distances_Q, np.zeros(5))


def test_large_images_are_compared_by_averages() -> None:
    image = np.repeat(np.repeat(noise(1, 7, side=32), 4, axis=1), 4, axis=2)
    assert np.array_equal(pixel_rows(image), pixel_rows(noise(1, 7, side=32)))


# --- samples, held-out and training images --------------------------------------------------------


class InMemory(ImageSet):
    def __init__(self, pixels: Pixels, mirrors: bool) -> None:
        count, side = pixels.shape[:2]
        super().__init__("memory", ("all",), np.zeros(count, np.int64), side, str(count))
        self.pixels, self.mirrors = pixels, mirrors

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        assert view == PLAIN
        return self.pixels[np.asarray(indices)]


def sets(mirrors: bool = False) -> Splits:
    return Splits(InMemory(noise(700, 1), mirrors), InMemory(noise(60, 2), mirrors))


def by_pixels(samples: Pixels, splits: Splits) -> dict[str, Any]:
    found, sheet = find_nearest(collection(samples), splits, colour_extractor())
    assert (found.train, found.held_out, found.samples) == (700, 60, len(samples))
    assert found.by.keys() == {"pixels", "colours"} and sheet.width > 10 * 64
    return found.by["pixels"]


def test_new_images_are_as_near_as_held_out_ones() -> None:
    each = by_pixels(noise(80, 3), sets())
    assert each["low"] < 0.5 < each["high"]
    assert nearest.verdict(each).startswith("as near as held-out images")


def test_copies_are_found_with_their_images() -> None:
    splits = sets()
    copies = np.concatenate([splits.train.read([650, 3]), noise(78, 3)])
    each = by_pixels(copies, splits)
    assert [(x["sample"], x["image"], x["distance"]) for x in each["pairs"][:2]] == [
        (0, "650", 0.0), (1, "3", 0.0),
    ]  # fmt: skip
    assert each["very_near"] >= 2 / 80
    each = by_pixels(splits.train.read(np.arange(80)), splits)
    assert each["nearer"] == each["low"] == 1.0 and each["very_near"] == 1.0
    assert nearest.verdict(each).startswith("nearer than held-out images")


@pytest.mark.parametrize("mirrors", [True, False])
def test_a_mirrored_copy_is_a_copy_where_images_may_be_mirrored(mirrors: bool) -> None:
    splits = sets(mirrors)
    flipped = splits.train.read(np.arange(40))[:, :, ::-1]
    each = by_pixels(np.ascontiguousarray(flipped), splits)
    assert (each["pairs"][0]["distance"] == 0.0) == mirrors
    assert (each["nearer"] == 1.0) == mirrors


def test_it_can_be_done_again_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = find_nearest(collection(noise(30, 3)), sets(), colour_extractor())
    monkeypatch.setattr(nearest, "BLOCK", 97)
    other, _ = find_nearest(collection(noise(30, 3)), sets(), colour_extractor())
    assert one == other


def test_of_many_samples_some_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "QUERIES", 20)
    splits = sets()
    found, _ = find_nearest(
        collection(splits.train.read(np.arange(90))), splits, colour_extractor()
    )
    assert (found.samples, found.held_out) == (20, 20)
    pairs = found.by["pixels"]["pairs"]
    assert all(pair["image"] == str(pair["sample"]) for pair in pairs)
    assert max(pair["sample"] for pair in pairs) > 20


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(run: Path, image_folder: Path, here: Path) -> report.Report:
    return prepared(run, image_folder, samples=30, nearest=True).run(silent)


@pytest.mark.usefixtures("here")
def test_report_sheet_and_model_card(
    run: Path, image_folder: Path, evaluated: report.Report, ctf: Command
) -> None:
    (folder,) = Path("evaluations").iterdir()
    found = evaluated.nearest
    assert found is not None and report.load(folder) == evaluated
    splits = open_images(str(image_folder), 32)
    assert (found.train, found.held_out) == (len(splits.train), len(splits.val))
    assert found.by.keys() == {"pixels", "fashion"}
    assert (image_folder / found.by["fashion"]["pairs"][0]["image"]).is_file()
    with Image.open(folder / "nearest.png") as sheet:
        assert sheet.width >= 10 * 64
    text = (folder / "report.md").read_text()
    assert "## Nearest training images" in text and "![Samples and their nearest" in text
    assert json.loads((folder / "asked.json").read_text())["nearest"] == [
        splits.train.fingerprint, splits.val.fingerprint,
    ]  # fmt: skip

    shown = ctf("evaluate", run, "--reference", image_folder, "--samples", 30, "--nearest",
                "--features", "fashion")  # fmt: skip
    assert shown.code == 0 and "by pixels" in shown.out and "nearest.png" in shown.out

    section = report.card_section(evaluated)
    number = f"{found.by['pixels']['nearer']:.3f}"
    made = card.text(Pipeline.from_pretrained(run), evaluation=section)
    assert "## Evaluation" in made and number in made and "FID-fashion" in made
    damaged = Path("evaluations/damaged/report.json")
    damaged.parent.mkdir()
    damaged.write_text("{}")
    pushed = ctf("push", run, "--to", "me/discs", "--dry-run")
    assert f"the model card has the scores of {folder}" in pushed.out
    other = ctf("push", "fashion-mnist", "--to", "me/other", "--dry-run", "--evaluation", folder)
    assert other.code == 2 and "of run, not of fashion-mnist as it is" in other.err


def test_without_the_option_the_report_is_as_before(
    run: Path, image_folder: Path, here: Path
) -> None:
    evaluation = prepared(run, image_folder, samples=30)
    assert "nearest" not in evaluation.config
    evaluation.run(silent)
    assert "nearest" not in json.loads((evaluation.folder / "report.json").read_text())


def test_images_can_be_compared_without_a_pipeline(image_folder: Path, here: Path) -> None:
    splits = open_images(str(image_folder), 32)
    count = len(splits.train)
    path = save_npz(here / "copies.npz", splits.train.read(np.arange(count)))
    result = prepared(path, image_folder, nearest=True).run(silent)
    assert result.nearest is not None
    assert result.nearest.by["pixels"]["nearer"] == 1.0


@pytest.mark.usefixtures("here")
def test_what_cannot_be_compared(run: Path, image_folder: Path, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "images.npz", noise(20, 1, side=32))
    with pytest.raises(UserError, match="needs the images that the model was trained on"):
        prepared(run, path, samples=30, nearest=True)
    with pytest.raises(UserError, match="was not trained on these images of fashion-mnist"):
        prepared(run, "fashion-mnist", samples=30, nearest=True)
    other = tmp_path / "discs"
    for i in range(30):
        (other / "red").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, i, side=32)[0]).save(other / "red" / f"{i}.png")
    with pytest.raises(UserError, match="was not trained on these images of discs"):
        prepared(run, other, samples=30, nearest=True)
    wide = save_npz(tmp_path / "wide.npz", np.repeat(noise(20, 1, side=32), 2, axis=2))
    with pytest.raises(UserError, match="images of 64 x 32 pixels, expected 32 x 32"):
        prepared(wide, image_folder, nearest=True)
