"""What `ctf fit` chooses for few images."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctf.common import config
from ctf.data.image_set import ImageSet, Splits
from ctf.data.tokens import Tokens
from ctf.data.transforms import VIEWS
from ctf.pipelines.pipeline import Pipeline
from ctf.training import few_images, recipes
from ctf.training.few_images import FEW, Choices, assignments, changes, choose
from tests.conftest import SIDE, SMALLER_RECIPE, Command, read_files

SMALL = recipes.preset("small")


class Blank(ImageSet):
    """Any number of images, which need no files."""

    def __init__(self, count: int, size: int = 64, *, mirrors: bool = True) -> None:
        classes_N = np.arange(count) % 2
        super().__init__("blank", ("a", "b"), classes_N, size, f"{count}")
        self.mirrors = mirrors

    def read(self, indices: object, view: object = None) -> object:  # type: ignore[override]
        raise NotImplementedError


def blank(count: int, size: int = 64, *, mirrors: bool = True) -> Splits:
    return Splits(Blank(count, size, mirrors=mirrors), Blank(2, size, mirrors=mirrors))


def small_for(images: Splits, chosen: Choices) -> recipes.Recipe:
    return recipes.resolve("small", images, overrides=assignments(chosen))


# --- by the number of images ----------------------------------------------------------------------


def test_few_images_have_many_views() -> None:
    assert changes(SMALL, 200, 64, mirrors=True)["tokens.views"] == "ten-crop"
    assert changes(SMALL, 200, 64, mirrors=False)["tokens.views"] == "five-crop"
    assert changes(SMALL, FEW - 1, 64, mirrors=True) == {"tokens.views": "ten-crop"}
    assert changes(SMALL, FEW, 64, mirrors=True) == {}


@pytest.mark.parametrize(
    ("images", "size", "codes", "clusters"),
    [
        (200, 32, 512, 32),  # 64 codes an image: 12,800 vectors
        (200, 64, 2048, 128),  # 256 codes
        (255, 64, 2048, 128),
        (256, 64, 4096, 256),  # 16 vectors for each code: as in the preset
        (20, 64, 256, 16),
        (1, 8, 64, 4),  # the fewest codes
    ],
)
def test_each_code_has_16_vectors_of_the_training_images(
    images: int, size: int, codes: int, clusters: int
) -> None:
    recipe = config.override(SMALL, assignments(changes(SMALL, images, size, mirrors=True)))
    assert (recipe.tokenizer.codebook_size, recipe.clusters.count) == (codes, clusters)
    assert codes == 64 or codes * 16 <= images * recipe.tokenizer.config(size).grid ** 2


@pytest.mark.parametrize(("minutes", "views"), [(17, None), (18, "ten-crop")])
def test_views_take_no_more_than_the_time_of_the_tokens(minutes: float, views: str | None) -> None:
    """500 images of 64 pixels in 20 views: 102.4 seconds, a tenth of 17.07 minutes."""
    chosen = changes(SMALL, 500, 64, mirrors=True, minutes=minutes)
    assert chosen.get("tokens.views") == views


@given(
    st.integers(2, 100_000),
    st.sampled_from((8, 32, 64, 256)),
    st.booleans(),
    st.none() | st.floats(0.1, 1e4),
)
def test_every_number_of_images_has_a_recipe_that_can_be_trained(
    count: int, size: int, mirrors: bool, minutes: float | None
) -> None:
    images = blank(count, size, mirrors=mirrors)
    chosen = choose(images, Path("missing"), minutes=minutes)
    recipe = small_for(images, chosen)
    recipes.check_recipe(images, recipe)
    if count >= FEW:
        assert chosen == {} and recipe == recipes.resolve("small", images)
    assert mirrors or not any(view.flip for view in VIEWS[recipe.tokens.views])


# --- what the user says ---------------------------------------------------------------------------


def test_what_the_user_says_is_not_chosen() -> None:
    images, run = blank(200), Path("missing")
    assert "tokens.views" in choose(images, run, overrides=["coarse.width=64"])
    assert "tokens.views" not in choose(images, run, views="plain")
    assert "tokens.views" not in choose(images, run, overrides=["tokens.views=flip"])
    # Codebook and clusters fit each other: the user sets one of them, or ctf sets both.
    for told in ("tokenizer.codebook_size=128", "clusters.count=9", "clusters.method=identity"):
        assert choose(images, run, overrides=[told]).keys() == {"tokens.views"}
    assert choose(images, run, started=True).keys() == {"tokens.views"}
    odd = blank(200, 34)  # no size for the preset's tokenizer, but for the user's
    factor = ["tokenizer.smallest_factor=2", "tokenizer.largest_grid=17"]
    assert choose(odd, run, overrides=factor).keys() == {"tokens.views"}
    assert choose(images, run, preset="small") == {}


def test_a_line_says_what_is_chosen_and_what_helps() -> None:
    images = blank(200)
    chosen = choose(images, Path("missing"))
    line = few_images.advice(images, chosen, started=False)
    assert line is not None and "\n" not in line
    assert line.startswith(
        "200 training images are few: 20 views of each (--views ten-crop); 128 clusters of 2,048 "
        "codes (--set tokenizer.codebook_size=2048 clusters.count=128); "
    )
    assert "--from" in line
    assert "--from" not in (few_images.advice(images, chosen, started=True) or "--from")
    assert few_images.advice(blank(FEW), {}, started=False) is None


# --- runs -----------------------------------------------------------------------------------------


OTHER_SIZES = [
    assignment
    for assignment in SMALLER_RECIPE
    if not assignment.startswith(("tokenizer.", "clusters."))
]


def fit(image_folder: Path, out: Path, *more: str) -> list[str | Path]:
    """`ctf fit` without a preset, with models that take seconds."""
    size = ("--image-size", str(SIDE), "--steps", "2")
    return ["fit", image_folder, "--out", out, *size, *more, "--set", *OTHER_SIZES]


def test_a_run_records_what_was_chosen_and_continues_with_it(
    image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "run"
    dry = ctf(*fit(image_folder, out, "--dry-run"))
    assert dry.code == 0 and "training images are few: 20 views" in dry.out and not out.exists()
    assert ctf(*fit(image_folder, out)).code == 0
    log = json.loads((out / "fit.json").read_text())
    assert log["chosen"] == {  # 20 images of 64 codes: 80 times 16
        "tokens.views": "ten-crop", "tokenizer.codebook_size": 64, "clusters.count": 4,
    }  # fmt: skip
    assert log["asked"]["recipe"]["tokens"]["views"] == "ten-crop"
    assert Tokens(out / "tokens", "train").views == 20
    clusters = Pipeline.from_pretrained(out).clusters
    assert (clusters.codebook_size, clusters.count) == (64, 4)
    before = read_files(out)
    assert ctf(*fit(image_folder, out)).code == 0
    assert read_files(out) == before
    refused = ctf(*fit(image_folder, out, "--views", "plain"))
    assert refused.code == 2 and 'views was "ten-crop", now "plain"' in refused.err


def test_runs_of_earlier_versions_keep_the_presets_values(
    image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    """They were begun without anything chosen, as now with the preset by its name."""
    out = tmp_path / "run"
    assert ctf(*fit(image_folder, out, "--preset", "small")).code == 0
    log = json.loads((out / "fit.json").read_text())
    assert log.pop("chosen") == {}
    (out / "fit.json").write_text(json.dumps(log))
    before = read_files(out)
    assert ctf(*fit(image_folder, out)).code == 0
    assert read_files(out) == before
    assert Tokens(out / "tokens", "train").views == 2


def test_a_run_that_starts_from_a_pipeline_has_many_views_too(
    run: Path, image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "out"
    assert ctf("fit", image_folder, "--out", out, "--from", run, "--steps", "2").code == 0
    assert Tokens(out / "tokens", "train").views == 20


def test_recorded_values_are_those_of_the_recipe() -> None:
    chosen = {"tokens.views": "plain", "clusters.count": 9}
    recipe = config.override(SMALL, assignments(chosen))
    assert (recipe.tokens.views, recipe.clusters.count) == ("plain", 9)
