"""`ctf fit --from`: a run that starts from a pipeline."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctf.common.errors import UserError
from ctf.data.images import open_images
from ctf.pipelines import card
from ctf.pipelines.folder import load_clusters
from ctf.pipelines.pipeline import Pipeline
from ctf.training import loop, recipes
from ctf.training.fit import fit
from ctf.training.recipes import resolve
from ctf.training.start import Start, open_start
from tests.conftest import (
    HUES,
    SIDE,
    Command,
    comparable,
    disc_image,
    read_files,
    recipe_options,
)

CPU = torch.device("cpu")
NEW = ("amber", "red")  # the run knows red


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("new") / "few"
    for number, name in enumerate(NEW):
        (root / name).mkdir(parents=True)
        for i in range(6):
            image = disc_image({**HUES, "amber": 0.12}[name], seed=900 + 100 * number + i)
            image.save(root / name / f"{i}.png")
    return root


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").open()]


def command(images: Path, out: Path, source: Path, *more: str) -> list[str | Path]:
    return ["fit", images, "--out", out, "--from", source, "--steps", "20", *more]


@pytest.fixture(scope="module")
def started(run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("started") / "out"
    start = open_start(run)
    splits = open_images(images, start.image_size)
    fit(splits, out, start.resolve(splits, steps=20), device=CPU, start=start)
    return out


def test_it_takes_over_tokenizer_clusters_and_sizes(run: Path, started: Path) -> None:
    for name in ("tokenizer/model.safetensors", "tokenizer/config.json"):
        assert (started / name).read_bytes() == (run / name).read_bytes()
    one, other = (load_clusters(x / "clusters" / "clusters.safetensors") for x in (run, started))
    assert torch.equal(one.labels_V, other.labels_V)
    assert (started / "clusters" / "swaps.png").is_file()
    pipe = Pipeline.from_pretrained(started)
    assert pipe.class_names == NEW
    assert pipe.coarse.config.width == 32 and pipe.fine is not None
    assert pipe.sample([0, 1], seed=0).images[0].size == (SIDE, SIDE)


def test_transformers_start_from_its_weights(run: Path, started: Path) -> None:
    """Before the first step, red is predicted as well as the source predicts its own images."""
    for stage in ("coarse", "fine"):
        first, source = metrics(started, stage)[0], metrics(run, stage)[-1]
        assert first["step"] == 0 and first["split"] == "val"
        sizes = {"coarse": 8, "fine": 64 / 8}
        assert first["loss"] < np.log(sizes[stage])
        assert first["loss"] == pytest.approx(source["loss"], rel=0.25)
        content = json.loads((started / stage / "config.json").read_text())
        assert len(content["warm_start"]) == 64


def test_it_is_recorded_and_the_same_command_finds_it_done(
    run: Path, images: Path, started: Path, ctf: Command
) -> None:
    asked = json.loads((started / "fit.json").read_text())["asked"]["from"]
    assert asked["pipeline"] == str(run) and asked["train_tokenizer"] is False
    before = read_files(started)
    result = ctf(*command(images, started, run))
    assert result.code == 0, result.err
    assert read_files(started) == before


def test_the_model_card_says_what_it_was_started_from(run: Path, started: Path) -> None:
    pipe = Pipeline.from_pretrained(started)
    assert pipe.origin["from"]["pipeline"] == run.name  # no path of this machine
    text = card.text(pipe)
    assert f"Started from `{run.name}`: its tokenizer, as it is, its clusters" in text
    assert str(run) not in text and "base_model" not in text
    pipe.origin = {"from": {"pipeline": "someone/model@v1", "train_tokenizer": True}}
    text = card.text(pipe)
    assert "base_model: someone/model\n" in text and "its tokenizer, trained on" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], "was begun with --from {run}, and is now continued without --from"),
        (["--from", "{other}"], "was begun with --from {run}, and is now continued with --from"),
        (["--from", "{run}", "--train-tokenizer"], "continued with --from {run} --train-tokenizer"),
    ],
)
def test_another_start_is_refused(
    run: Path, images: Path, started: Path, tmp_path: Path, ctf: Command,
    changed: list[str], message: str,
) -> None:  # fmt: skip
    other = tmp_path / "other"
    Pipeline.from_pretrained(run).save_pretrained(other)
    options = [text.format(run=run, other=other) for text in changed]
    if not options:
        options = ["--preset", "tiny", "--image-size", str(SIDE), *recipe_options()]
    before = read_files(started)
    result = ctf("fit", images, "--out", started, "--steps", "20", *options)
    assert result.code == 2 and message.format(run=run) in result.err
    assert len(result.err.strip().splitlines()) <= 2
    assert read_files(started) == before


def test_a_moved_source_is_the_same(
    run: Path, images: Path, started: Path, tmp_path: Path, ctf: Command
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(started, out)
    shutil.copytree(run, moved)
    result = ctf(*command(images, out, moved))
    assert result.code == 0, result.err
    assert json.loads((out / "fit.json").read_text())["asked"]["from"]["pipeline"] == str(moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "64"], "its images have 32 pixels, got 64; omit --image-size"),
        (["--preset", "tiny"], "has other sizes than the recipe: tokenizer."),
        (["--set", "coarse.width=64"], "coarse.width was 32, now 64"),
        (["--set", "clusters.count=16"], "clusters.count was 8, now 16"),
        (["--set", "tokenizer.codebook_size=128"], "codebook_size was 64, now 128"),
    ],
)
def test_sizes_must_match(
    run: Path, images: Path, tmp_path: Path, ctf: Command, options: list[str], message: str
) -> None:
    result = ctf(*command(images, tmp_path / "out", run), *options)
    assert result.code == 2 and message in result.err and f"--from {run}" in result.err
    assert "omit --" in result.err and len(result.err.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_start_from(run: Path, images: Path, tmp_path: Path, ctf: Command) -> None:
    out, half = tmp_path / "out", tmp_path / "half"
    result = ctf(*command(images, out, Path("no-such-pipeline")))
    assert result.code == 2 and "no pipeline 'no-such-pipeline'" in result.err
    shutil.copytree(run, half)
    (half / "fine" / "model.safetensors").unlink()
    result = ctf(*command(images, out, half))
    assert result.code == 2 and "its fine is missing; finish its training first" in result.err
    result = ctf(*command(images, run, run))
    assert result.code == 2 and "is the folder of the run" in result.err
    result = ctf("fit", images, "--out", out, "--train-tokenizer")
    assert result.code == 2 and "--train-tokenizer is for --from" in result.err
    assert not out.exists()


def test_dry_run_says_what_is_taken_over(
    run: Path, images: Path, tmp_path: Path, ctf: Command
) -> None:
    plain = command(images, tmp_path / "out", run, "--dry-run")
    result = ctf(*plain)
    assert result.code == 0
    assert f"from {run}: its tokenizer (as it is), its 8 clusters" in result.out
    assert "it knows 1 of 2 classes" in result.out
    stages = [line.partition(":")[0] for line in result.out.splitlines()]
    assert "coarse" in stages and "fine" in stages and "tokenizer" not in stages
    result = ctf(*plain, "--train-tokenizer")
    assert "its tokenizer (trained on)" in result.out and "\ntokenizer: " in result.out
    assert not (tmp_path / "out").exists()


def test_minutes_are_shared_without_the_tokenizer(run: Path, images: Path, tmp_path: Path) -> None:
    start, out = open_start(run), tmp_path / "out"
    splits = open_images(images, start.image_size)
    fit(splits, out, start.resolve(splits), minutes=0.05, device=CPU, start=start)
    log = json.loads((out / "fit.json").read_text())
    assert log["plan"].keys() == {"tokens", "coarse", "fine"}
    assert log["done"] == ["tokenizer", "tokens", "clusters", "coarse", "fine"]
    assert Pipeline.from_pretrained(out).class_names == NEW


def test_a_tokenizer_that_is_trained_on_keeps_codes_and_clusters(
    run: Path, images: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "out"
    result = ctf(*command(images, out, run, "--train-tokenizer"))
    assert result.code == 0, result.err
    content = json.loads((out / "tokenizer" / "config.json").read_text())
    assert content["training"]["free_until"] == content["training"]["revive_until"] == 0
    assert len(content["warm_start"]) == 64
    first, *_, last = metrics(out, "tokenizer")
    assert first["step"] == 0 and first["psnr"] > 10
    assert last["step"] == 20 and last["psnr"] != first["psnr"]
    old, new = (Pipeline.from_pretrained(x) for x in (run, out))
    assert torch.equal(old.clusters.labels_V, new.clusters.labels_V)
    similar_V = torch.cosine_similarity(old.tokenizer.codebook(), new.tokenizer.codebook())
    assert 0.5 < float(similar_V.min()) < 1
    assert new.origin["from"]["train_tokenizer"] is True


def test_killed_it_resumes_to_the_same_bits(
    run: Path, images: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in each transformer: a resumed training does not start from the source again."""

    class Killed(BaseException):
        pass

    out, start = tmp_path / "out", open_start(run)
    splits = open_images(images, start.image_size)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "LOG_EVERY", 10)
    whole = tmp_path / "whole"
    fit(splits, whole, start.resolve(splits, steps=20), device=CPU, start=start)
    for stage in ("coarse", "fine"):

        class Stop:
            def __init__(self, name: str) -> None:
                self.name = name

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def __call__(self, done: int, *_: object) -> None:
                if self.name == stage and done == 20:  # noqa: B023
                    raise Killed

        with pytest.raises(Killed):
            fit(
                splits, out, start.resolve(splits, steps=20), device=CPU, start=start,
                open_progress=Stop,  # type: ignore[arg-type]
            )  # fmt: skip
        assert (out / stage / "state" / "step-00000010.safetensors").is_file()
    fit(splits, out, start.resolve(splits, steps=20), device=CPU, start=start)
    assert comparable(out).keys() == comparable(whole).keys()
    for stage in ("coarse", "fine"):
        name = f"{stage}/model.safetensors"
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_stage_by_stage_is_what_fit_does(
    run: Path, images: Path, started: Path, tmp_path: Path, ctf: Command
) -> None:
    out, recipe = tmp_path / "out", ("--preset", "tiny", "--steps", 20, *recipe_options())
    for arguments in (
        ("tokens", "extract", images, "--run", out, "--from", run, "--preset", "tiny"),
        ("clusters", "fit", out, "--from", run),
        ("train", "coarse", out, "--from", run, *recipe),
        ("train", "fine", out, "--from", run, *recipe),
    ):
        for _ in range(2):  # again, it is done
            result = ctf(*arguments)
            assert result.code == 0, result.err
    for part in ("tokenizer", "coarse", "fine"):
        name = f"{part}/model.safetensors"
        assert (out / name).read_bytes() == (started / name).read_bytes()
    assert Pipeline.from_pretrained(out).origin["from"] == {"pipeline": run.name}
    refused = ctf("clusters", "fit", out, "--count", 8)
    assert refused.code == 2 and "another configuration: taken_over was" in refused.err


def test_a_tokenizer_trained_on_as_a_stage_fits_the_models_of_its_source(
    run: Path, images: Path, tmp_path: Path, ctf: Command
) -> None:
    out, recipe = tmp_path / "out", ("--preset", "tiny", *recipe_options())
    for arguments in (
        ("tokenizer", "train", images, "--out", out, "--from", run, "--steps", 10, *recipe),
        ("tokens", "extract", images, "--run", out, "--preset", "tiny"),
        ("clusters", "fit", out, "--from", run),
        ("train", "coarse", out, "--from", run, "--steps", 10, *recipe),
    ):
        result = ctf(*arguments)
        assert result.code == 0, result.err
    assert metrics(out, "coarse")[0]["step"] == 0
    other = ctf("tokens", "extract", images, "--run", out, "--from", run, "--preset", "tiny")
    assert other.code == 2 and "has another tokenizer than" in other.err


# --- the recipe -----------------------------------------------------------------------------------


def test_the_shipped_pipeline_gives_its_recipe(images: Path) -> None:
    start = open_start("fashion-mnist")
    assert start.image_size == 32
    splits = open_images(images, 32)
    recipe = start.resolve(splits)
    small = recipes.preset("small")
    assert (recipe.coarse, recipe.fine, recipe.clusters) == (
        small.coarse, small.fine, small.clusters,
    )  # fmt: skip
    # It was trained by AdamW.
    assert recipe.coarse_training == dataclasses.replace(small.coarse_training, optimizer=None)
    assert recipe.tokens.views == "flip"  # unlike the source's images, these may be mirrored
    assert start.resolve(splits, views="plain").tokens.views == "plain"
    assert start.resolve(splits, preset="small", steps=7).fine_training.steps == 7


def test_a_pipeline_without_a_recipe_sets_the_sizes_of_small(run: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run)
    pipe.origin = {}
    pipe.save_pretrained(tmp_path / "plain")
    start = open_start(tmp_path / "plain")
    splits = open_images("fashion-mnist")
    recipe = start.resolve(splits)
    assert recipe.tokenizer.config(SIDE) == start.tokenizer
    assert (recipe.coarse.width, recipe.fine.layers, recipe.clusters.count) == (32, 1, 8)
    assert recipe.coarse_training == recipes.preset("small").coarse_training
    assert recipe.tokens.views == "plain"


def full_vocabulary(run: Path, out: Path, ctf: Command) -> Start:
    arguments = ("--preset", "tiny", "--steps", 5, *recipe_options())
    assert ctf("train", "baseline", run, "--out", out, *arguments).code == 0
    return open_start(out)


def test_a_full_vocabulary_pipeline_stays_one(
    run: Path, images: Path, tmp_path: Path, ctf: Command
) -> None:
    start = full_vocabulary(run, tmp_path / "baseline", ctf)
    splits = open_images(images, SIDE)
    recipe = start.resolve(splits, steps=5)
    assert recipe.clusters.method == "identity"
    pipe = fit(splits, tmp_path / "out", recipe, device=CPU, start=start)
    assert pipe.fine is None and pipe.clusters.count == 64


def test_python_with_another_recipe_is_refused(run: Path, images: Path, tmp_path: Path) -> None:
    splits = open_images(images, SIDE)
    with pytest.raises(UserError, match="has other sizes than the recipe"):
        fit(splits, tmp_path / "out", resolve("tiny", splits), device=CPU, start=open_start(run))
    assert not (tmp_path / "out").exists()
