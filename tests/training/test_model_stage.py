"""The coarse or the fine model of a run: which options are part of its configuration."""

import json
import shutil
from pathlib import Path

from ctf.common import storage
from tests.conftest import Command, recipe_options


def test_corruption_is_part_of_the_configuration(run: Path, tmp_path: Path, ctf: Command) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fine")
    wrong = recipe_options("fine_corruption=0.2", "fine_training.steps=2")
    assert ctf("train", "fine", tmp_path / "run", "--preset", "tiny", *wrong).code == 0
    stored = json.loads((tmp_path / "run" / "fine" / "config.json").read_text())
    assert stored["corruption"] == 0.2
    without = ctf("train", "fine", tmp_path / "run", "--preset", "tiny", *recipe_options())
    assert without.code == 2
    bad = ctf(
        "train", "fine", tmp_path / "run", "--preset", "tiny", *recipe_options("fine_corruption=1")
    )
    assert bad.code == 2
    assert "expected 0 to below 1" in bad.err


def test_geometry_is_part_of_the_configuration_and_not_of_the_weights(
    run: Path, tmp_path: Path, ctf: Command
) -> None:
    copied, two = shutil.copytree(run, tmp_path / "run"), recipe_options("coarse_training.steps=2")
    shutil.rmtree(copied / "coarse")
    train = ("train", "coarse", copied, "--preset", "tiny")
    assert ctf(*train, *two).code == 0
    assert json.loads((copied / "coarse" / "config.json").read_text())["geometry"] is True
    tensors, _ = storage.load_tensors(copied / "coarse" / "model.safetensors")
    assert not [name for name in tensors if "parametrizations" in name]
    off = recipe_options("coarse_training.steps=2", "geometry=false")
    refused = ctf(*train, *off)
    assert refused.code == 2 and "geometry was true, now false" in refused.err


def test_the_group_loss_is_for_the_baseline(run: Path, tmp_path: Path, ctf: Command) -> None:
    grouped = recipe_options(
        "group_loss.weight=1", "group_loss.clusters.count=4", "coarse_training.steps=2"
    )
    out = tmp_path / "baseline"
    assert ctf("train", "baseline", run, "--out", out, "--preset", "tiny", *grouped).code == 0
    stored = json.loads((out / "coarse" / "config.json").read_text())
    assert stored["group_loss"]["clusters"]["method"] == "balanced"
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "coarse")
    refused = ctf("train", "coarse", tmp_path / "run", "--preset", "tiny", *grouped)
    assert refused.code == 2
    assert "is for the full-vocabulary baseline" in refused.err
