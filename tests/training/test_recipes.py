"""Every recipe can be built at the image sizes it may meet, and mistakes name what was meant."""

import dataclasses

import pytest
import torch

from ctf.common import config
from ctf.common.errors import UserError
from ctf.data import image_set
from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.tokenizer import VQModel
from ctf.training import fit
from ctf.training.recipes import PRESETS, check_recipe, preset, resolve, with_steps

SIZES = (16, 32, 48, 64, 96, 128, 256)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str, size: int) -> None:
    recipe = preset(name)
    shape = recipe.tokenizer.config(size)
    assert shape.codebook_size >= 4096 and shape.code_dim == 8  # a large codebook is the point
    assert shape.factor >= recipe.tokenizer.smallest_factor
    assert shape.grid <= recipe.tokenizer.largest_grid
    # No coarser than it must be.
    assert shape.factor == recipe.tokenizer.smallest_factor or 2 * shape.grid > (
        recipe.tokenizer.largest_grid
    )
    labels_V = torch.arange(shape.codebook_size) % recipe.clusters.count
    parts = clusters.Clusters.from_labels(labels_V)
    with torch.device("meta"):
        tokenizer = VQModel(shape)
        coarse = CoarseModel(recipe.coarse.config(shape.grid, 10), parts.count)
    fine_shape = recipe.fine.config(shape.grid, 10)
    with torch.device("meta"):
        fine = FineModel(fine_shape, parts, recipe.fine_softmax)
        codes_BL = tokenizer.encode(torch.empty(2, 3, size, size))
        decoded_BCHW = tokenizer.decode(codes_BL)
        logits_BLK = coarse(codes_BL, torch.zeros(2, dtype=torch.int64))
    assert codes_BL.shape == (2, shape.grid**2)
    assert decoded_BCHW.shape == (2, 3, size, size)
    assert logits_BLK.shape == (2, shape.grid**2, recipe.clusters.count)
    assert fine.head.weight.shape == (shape.codebook_size, recipe.fine.width)


def test_base_is_the_papers() -> None:
    recipe = preset("base")
    with torch.device("meta"):
        tokenizer = VQModel(recipe.tokenizer.config(256))
        coarse = CoarseModel(recipe.coarse.config(tokenizer.grid, 1000), recipe.clusters.count)
    assert (tokenizer.grid, tokenizer.config.codebook_size) == (16, 16384)
    assert recipe.clusters.count == 512
    millions = [round(sum(p.numel() for p in m.parameters()) / 1e6) for m in (tokenizer, coarse)]
    assert millions == [72, 87]  # LlamaGen's table 1; the paper's table 1


def test_tiny_runs() -> None:
    """At the size of the included images, with the numbers of the README."""
    recipe = preset("tiny")
    shape = recipe.tokenizer.config(32)
    assert shape.codebook_size == 4096 and (shape.factor, shape.grid) == (4, 8)
    assert recipe.clusters.count < shape.codebook_size / 8


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_that_do_not_divide(name: str) -> None:
    with pytest.raises(UserError, match=r"image size 67 is not divisible .* factor \d+; use"):
        preset(name).tokenizer.config(67)


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match=r"^unknown preset 'smal': did you mean 'small'\?$"):
        preset("smal")
    with pytest.raises(UserError, match=r"^unknown preset 'x': expected tiny, small, base, image"):
        preset("x")


def test_steps() -> None:
    recipe = preset("small").with_steps(7)
    for training in (recipe.tokenizer_training, recipe.coarse_training, recipe.fine_training):
        assert training.steps == 7
        assert training.warm_up == 0
    assert with_steps(recipe.coarse_training, 10_000).warm_up <= 100
    short = with_steps(preset("small").coarse_training, 500)
    assert (short.steps, short.warm_up) == (500, 50)
    rest = dataclasses.replace(short, steps=1, warm_up=0)
    assert rest == dataclasses.replace(preset("small").coarse_training, steps=1, warm_up=0)


def test_the_users_choices_change_the_preset(splits: image_set.Splits) -> None:
    plain = resolve("tiny", splits)
    assert plain == preset("tiny")
    chosen = resolve(
        "tiny", splits, steps=5, views="ten-crop", overrides=["coarse.width=64", "clusters.count=9"]
    )
    assert chosen.tokens.views == "ten-crop"
    assert (chosen.coarse.width, chosen.clusters.count, chosen.fine_training.steps) == (64, 9, 5)
    fashion = image_set.Splits(Shoes(splits.train), Shoes(splits.val))
    assert resolve("tiny", fashion).tokens.views == "plain"
    assert resolve("tiny", fashion, views="flip").tokens.views == "flip"


class Shoes(image_set.ImageSet):
    """Images that must not be mirrored."""

    mirrors = False

    def __init__(self, like: image_set.ImageSet) -> None:
        super().__init__("shoes", like.class_names, like.classes_N, like.image_size, "shoes")

    def read(self, indices: object, view: object = None) -> object:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["coarse.witdh=1"], "--set coarse.witdh: unknown key 'witdh': did you mean 'width'?"),
        (["coares.width=1"], "--set coares.width: unknown key 'coares': did you mean 'coarse'?"),
        (["coarse.width"], "--set coarse.width: expected KEY=VALUE"),
        (["coarse.width=wide"], "--set coarse.width: got 'wide', expected int"),
        (["fine_softmax=x"], "--set fine_softmax: unknown value 'x': expected members, full"),
        (["coarse_training.steps=0"], "steps: got 0"),
        (["tokens.batch_size=0"], "batch_size: got 0"),
        (["clusters.count=0"], "clusters.count: got 0"),
        (["sampling.temperature=0"], "temperature: got 0"),
        (["tokenizer.smallest_factor=3"], "smallest_factor: got 3, expected a power of 2"),
        (["tokenizer.largest_grid=0"], "largest_grid: got 0, expected 1 or more"),
    ],
)
def test_wrong_values(splits: image_set.Splits, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("tiny", splits, overrides=overrides)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.codebook_size=64"], "got 256 clusters, expected 1 to 64"),
        (["coarse.width=130"], "width 130 with 4 heads: expected a multiple of 4 * heads = 16"),
        (["fine.layers=0"], "layers: got 0, expected 1 or more"),
        (["fine.dropout=1"], "dropout: got 1.0"),
        (["tokenizer.groups=3"], "channels: got 16, expected a multiple of groups 3"),
        (["tokenizer.multipliers=[]"], "multipliers: got []"),
        (["tokenizer.smallest_factor=64"], "image size 32 is not divisible"),
    ],
)
def test_values_that_do_not_fit_together(
    splits: image_set.Splits, overrides: list[str], message: str
) -> None:
    recipe = resolve("tiny", splits, overrides=overrides)
    for refuses in (
        lambda: check_recipe(splits, recipe),
        lambda: fit.describe(splits, recipe, None),
    ):
        with pytest.raises(UserError) as caught:
            refuses()
        assert message in str(caught.value)


def test_identity_needs_no_count(splits: image_set.Splits) -> None:
    overrides = ["tokenizer.codebook_size=64", "clusters.method=identity"]
    check_recipe(splits, resolve("tiny", splits, overrides=overrides))


def test_description(splits: image_set.Splits) -> None:
    text = fit.describe(splits, preset("tiny"), None)
    first, *stages = (line for line in text.splitlines() if not line.startswith(" "))
    assert first == "32 pixels -> 8 x 8 of 4096 codes in 256 clusters"
    assert [line.split(":")[0] for line in stages] == ["tokenizer", "tokens", "coarse", "fine"]
    assert "600 steps" in text
    _, *stages, last = fit.describe(splits, preset("tiny"), 3).splitlines()
    assert [line.split(":")[0] for line in stages] == ["tokenizer", "coarse", "fine"]
    assert last == "about 3 minutes in all"


def test_recipes_are_plain_json() -> None:
    for recipe in PRESETS.values():
        assert config.from_json(type(recipe), config.to_json(recipe), "here") == recipe
